"""The proof before any work: attention that narrower heads could not reproduce is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.llama import modeling_llama

from lowrank_compress.errors import UnsupportedError
from lowrank_compress.model.checkpoint import Checkpoint
from lowrank_compress.model.narrowing import check_narrowing
from lowrank_compress.model.skeleton import Skeleton
from lowrank_compress.model.walk.batch import Batch
from tests.tiny import save_tiny

BATCH = Batch(torch.arange(4, 44).view(2, 20))


@pytest.fixture
def skeleton(tmp_path: Path) -> Skeleton:
    return Skeleton(Checkpoint(save_tiny("llama", tmp_path)), torch.device("cpu"), torch.float32)


def test_the_familys_own_attention_passes_and_the_model_stays_stock(skeleton: Skeleton) -> None:
    names = list(skeleton.model.state_dict())
    check_narrowing(skeleton, BATCH)
    assert list(skeleton.model.state_dict()) == names
    assert {type(block.self_attn) for block in skeleton.blocks} == {modeling_llama.LlamaAttention}


def test_attention_that_does_something_more_is_refused(skeleton: Skeleton, monkeypatch: pytest.MonkeyPatch) -> None:
    stock = modeling_llama.LlamaAttention.forward

    def louder(self: Any, *args: Any, **kwargs: Any) -> Any:
        out, weights = stock(self, *args, **kwargs)
        return 1.01 * out, weights

    monkeypatch.setattr(modeling_llama.LlamaAttention, "forward", louder)
    with pytest.raises(UnsupportedError, match="computes something else than attention with narrower heads"):
        check_narrowing(skeleton, BATCH)


def test_pairs_that_are_neighbours_are_refused(skeleton: Skeleton, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other families turn dimension 2i with 2i + 1; dropping their pairs as halves would ruin the model."""

    def interleaved(q: Any, k: Any, cos: Any, sin: Any) -> Any:
        half = cos.shape[-1] // 2
        cos, sin = (table[..., :half].repeat_interleave(2, -1).unsqueeze(1) for table in (cos, sin))

        def turn(x: Any) -> Any:
            return torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)

        return q * cos + turn(q) * sin, k * cos + turn(k) * sin

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", interleaved)
    with pytest.raises(UnsupportedError, match="computes something else than attention with narrower heads"):
        check_narrowing(skeleton, BATCH)
