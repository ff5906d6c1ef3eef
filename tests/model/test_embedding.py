"""From hidden states to an embedding, and the Fisher matrix of its change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModel

from lowrank_compress.calibration.capture import capture
from lowrank_compress.errors import CheckpointError
from lowrank_compress.model.checkpoint import Checkpoint
from lowrank_compress.model.embedding import POOLINGS, Embedding, embedding_of
from lowrank_compress.model.skeleton import Skeleton
from lowrank_compress.model.walk.batch import Batch
from tests.tiny import tiny_model, tiny_tokenizer


def slowly(mode: str, rows: list[Tensor]) -> Tensor:
    """One text at a time, one dimension at a time."""
    whole = torch.stack(rows)
    count = len(rows)
    columns = {
        "mean": [sum(column) / count for column in whole.T],
        "cls": list(rows[0]),
        "max": [max(column) for column in whole.T],
        "mean_sqrt_len_tokens": [sum(column) / count**0.5 for column in whole.T],
        "lasttoken": list(rows[-1]),
    }
    return torch.stack([torch.as_tensor(value) for value in columns[mode]])


@pytest.mark.parametrize("mode", POOLINGS)
def test_poolings_count_no_padding(mode: str) -> None:
    hidden = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0)).double()
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 1, 1, 1]])
    expected = torch.stack([slowly(mode, list(h[m.bool()])) for h, m in zip(hidden, mask, strict=True)])
    torch.testing.assert_close(Embedding((mode,), normalised=False).of(hidden, mask), expected)
    expected = expected / expected.norm(dim=1, keepdim=True)
    torch.testing.assert_close(Embedding((mode,)).of(hidden, mask), expected)


def saved(path: Path, files: dict[str, Any]) -> Checkpoint:
    model: Any = tiny_model("bert", "classification").base_model
    model.config.architectures = ["BertModel"]
    model.save_pretrained(path)
    tiny_tokenizer(path)
    for name, content in files.items():
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text(json.dumps(content))
    return Checkpoint(path)


def modules(*kinds: str) -> list[dict[str, str]]:
    return [{"path": "1_Pooling", "type": f"sentence_transformers.models.{kind}"} for kind in kinds]


def test_what_the_files_say(tmp_path: Path) -> None:
    flags = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    whole = modules("Transformer", "Pooling", "Normalize")
    assert embedding_of(saved(tmp_path / "0", {})) == Embedding(("mean",), True, None)
    files: dict[str, Any] = {"modules.json": whole, "1_Pooling/config.json": flags}
    assert embedding_of(saved(tmp_path / "1", files)) == Embedding(("cls",), True, None)
    files |= {"sentence_bert_config.json": {"max_seq_length": 64}, "1_Pooling/config.json": {"pooling_mode": "max"}}
    assert embedding_of(saved(tmp_path / "2", files)) == Embedding(("max",), True, 64)
    files["modules.json"] = whole[:2]
    assert embedding_of(saved(tmp_path / "3", files)).normalised  # compared by the cosine all the same
    files["config_sentence_transformers.json"] = {"similarity_fn_name": "dot"}
    assert not embedding_of(saved(tmp_path / "4", files)).normalised
    files["modules.json"] = [whole[0], {**whole[1], "path": "../1"}]
    with pytest.raises(CheckpointError, match=r"names '\.\./1'; expected a directory inside"):
        embedding_of(saved(tmp_path / "5", files))


def test_the_mean_of_many_draws_is_the_gauss_newton_matrix(tmp_path: Path) -> None:
    """Second moments of the gradients at a linear layer's output, against the Jacobian of the embedding."""
    checkpoint = saved(tmp_path / "model", {})
    ids = torch.tensor([[5, 9, 2, 30, 41], [11, 4, 8, 60, 23]])
    name = "encoder.layer.0.output.dense"
    batches = [Batch(ids.repeat(250, 1), outputs=1) for _ in range(4)]
    wanted = {f"{name}": frozenset({"out_fisher"})}
    skeleton = Skeleton(checkpoint, torch.device("cpu"), torch.float64)
    (target,) = (target.name for target in skeleton.resolved.targets if target.module == name)
    (found,) = capture(skeleton, batches, {target: wanted[name]}, skip=lambda block: block != 0)
    stock = AutoModel.from_pretrained(checkpoint.path).double().eval()

    def add(module: Any, args: Any, out: Tensor) -> Tensor:
        return out + shift

    def embedded(moved: Tensor) -> Tensor:
        nonlocal shift
        shift = moved
        return torch.nn.functional.normalize(stock(input_ids=ids).last_hidden_state.mean(1), dim=1)

    shift = torch.zeros(2, 5, 32).double()
    stock.get_submodule(name).register_forward_hook(add)
    jacobian = torch.autograd.functional.jacobian(embedded, torch.zeros(2, 5, 32).double())
    assert isinstance(jacobian, Tensor)
    # (text, width of it, text, token, unit): a text's embedding depends on its own tokens only.
    own = torch.stack([jacobian[i, :, i] for i in range(2)])
    expected = torch.einsum("tdlm,tdln->mn", own, own) / 2  # a mean over texts
    matrix = found.means[f"{target}/out_fisher"]
    assert (matrix - expected).norm() < 0.1 * expected.norm()
    torch.testing.assert_close(matrix.trace(), expected.trace(), rtol=0.05, atol=0)
