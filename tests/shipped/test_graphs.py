"""Compressed models as graphs: torch.export, and torch.onnx.export with onnxruntime (others test torch.compile)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from tests.runs import Tiny, done

torch.set_num_threads(1)
IDS = torch.tensor([[5, 9, 2, 30, 41, 7, 3, 12], [11, 4, 8, 8, 60, 23, 90, 17]])
FORMS = {
    "pair": ("--method", "svd", "--storage", "pair"),
    "pivot": ("--method", "svd", "--storage", "pivot"),
    "modegpt": ("--method", "modegpt", "--samples", "8", "--seq-len", "32"),
}


class Logits(nn.Module):
    """Ids to logits, and nothing else."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.eval()

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids, use_cache=False).logits


@pytest.fixture(scope="module", params=FORMS)
def made(request: pytest.FixtureRequest, tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> tuple[Logits, Tensor]:
    run = tmp_path_factory.mktemp("graphs") / "run"
    options = FORMS[request.param]
    if request.param == "modegpt":
        options = (*options, "--calibration", str(tiny.text))
    done("compress", tiny.model, "--ratio", "0.2", *options, "--out", run)
    model = Logits(AutoModelForCausalLM.from_pretrained(run / "model").eval())
    with torch.no_grad():
        return model, model(IDS)


def test_torch_export(made: tuple[Logits, Tensor]) -> None:
    model, expected = made
    program = torch.export.export(model, (IDS,), strict=False)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(IDS), expected)


def test_onnx(made: tuple[Logits, Tensor], tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="needs onnx, onnxscript and onnxruntime")
    runtime = pytest.importorskip("onnxruntime", reason="needs onnx, onnxscript and onnxruntime")
    model, expected = made
    torch.onnx.export(model, (IDS,), tmp_path / "model.onnx", dynamo=True, verbose=False)
    session = runtime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: IDS.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-4)
