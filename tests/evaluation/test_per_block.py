"""Each block of a compressed model by itself, against whole models in which one block was exchanged."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from lowrank_compress.calibration.windows import evaluation_windows, window_batches
from lowrank_compress.evaluation.per_block import block_losses
from lowrank_compress.model.checkpoint import Checkpoint
from lowrank_compress.model.skeleton import Skeleton
from tests.evaluation.test_contrast import TEXT, blocks_of, pair
from tests.ordinary import load


@pytest.mark.parametrize("case", ["gemma2-lm", "gpt2-lm"])
def test_equals_whole_models_with_one_block_exchanged(case: str, tmp_path: Path) -> None:
    paths = pair(case, tmp_path)
    windows = evaluation_windows(TEXT, 20, 1)
    said: list[tuple[int, int]] = []
    dense, other = (Skeleton(Checkpoint(path), torch.device("cpu"), torch.float64) for path in paths)
    found = block_losses(dense, other, window_batches(windows, 2), lambda *done: said.append(done))
    whole, changed = (load(path, "lm") for path in paths)
    count = len(blocks_of(whole))
    assert len(found) == count
    assert said[-1] == (count, count)
    for number in range(count):
        mixed: Any = copy.deepcopy(whole)
        blocks_of(mixed)[number].load_state_dict(blocks_of(changed)[number].state_dict())
        increase, divergence, tokens = 0.0, 0.0, 0
        for window in windows:
            with torch.no_grad():
                p, q = (model(window[None]).logits[0, :-1].log_softmax(-1) for model in (whole, mixed))
            increase += float((p - q).gather(1, window[1:, None]).sum())
            divergence += float((p.exp() * (p - q)).sum())
            tokens += len(window) - 1
        assert found[number].increase == pytest.approx(increase / tokens, rel=1e-8)
        assert found[number].divergence == pytest.approx(divergence / tokens, rel=1e-8)
