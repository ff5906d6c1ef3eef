"""The same results on a GPU as on the CPU, to rounding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lowrank_compress.artifacts.documents import read_json
from lowrank_compress.config import EvaluateConfig
from lowrank_compress.recipe import Recipe
from lowrank_compress.stages import pipeline
from lowrank_compress.stages.plan import make_plan
from lowrank_compress.stages.run import Run
from tests.tiny import save_tiny, tiny_text

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("method", ["svd-llm", "kfac", "fwsvd", "afm"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_a_gpu_run_equals_a_cpu_run(tmp_path: Path, method: str, model_type: str) -> None:
    model = save_tiny(model_type, tmp_path / "dense")
    text = tmp_path / "text.txt"
    text.write_text(tiny_text(6000))
    losses, perplexities = [], []
    for device in ("cpu", "cuda"):
        recipe = Recipe(
            model=str(model),
            calibration=str(text),
            method=method,
            seq_len=32,
            samples=32,
            device=device,
            storage="pivot",
        )
        run = Run(tmp_path / device)
        pipeline.compress(make_plan(recipe), run)
        matrices = read_json(run.model / "lowrank.json")["matrices"]
        losses.append([matrix["predicted_loss"] for matrix in matrices.values()])
        config = EvaluateConfig(perplexity=(str(text),), seq_len=32, device=device)
        (found,) = pipeline.evaluate_target(str(run.model), config).report["perplexity"].values()
        perplexities.append(found["compressed"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3, abs=1e-9)
    assert perplexities[1] == pytest.approx(perplexities[0], rel=1e-3)
