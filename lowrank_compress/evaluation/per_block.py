"""What each block of a compressed model costs by itself: the dense model with that block alone put in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_compress.model.skeleton import Skeleton
from lowrank_compress.model.walk.batch import Batch
from lowrank_compress.model.walk.head import lm_chunks
from lowrank_compress.model.walk.walk import Walk


@dataclass(frozen=True)
class BlockLoss:
    """What one block alone does to a language model's predictions, in nats a token.

    Attributes
    ----------
    increase
        Cross-entropy with it, less that of the dense model.
    divergence
        KL(dense ‖ with it).
    """

    increase: float
    divergence: float


def block_losses(
    dense: Skeleton,
    compressed: Skeleton,
    batches: Sequence[Batch],
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> list[BlockLoss]:
    """Measure every block of a compressed model in the place of its counterpart in the dense one, one at a time.

    One block of each is in memory. The states of as many models as there are blocks go along, so that of L blocks
    L²/2 are run: meant for a few windows.

    Parameters
    ----------
    dense, compressed
        A causal language model, and one that was made from it.
    batches
        Windows of text.
    advance
        Called with (blocks done, blocks in all).

    Returns
    -------
    list of BlockLoss
        For each block.
    """
    walk = Walk([dense, compressed], batches, feeds=(0, 0))
    lanes: list[list[Tensor]] = []
    for step in walk.forwards():
        entered = []
        for number in range(len(batches)):
            with torch.no_grad():
                entering, _ = step.run(number, 0)
                for lane in lanes:
                    lane[number] = step.call(number, lane[number], 0)
                entered.append(step.call(number, entering, 1))
        lanes.append(entered)
        step.leave()
        advance(step.index + 1, walk.blocks)
    totals, tokens = [[0.0, 0.0] for _ in lanes], 0
    for number, batch in enumerate(batches):
        for start, stop in lm_chunks(batch, 128):
            targets = batch.ids[:, start + 1 : stop + 1, None]
            expected = _logs(walk, number, walk.leaving(number), start, stop)
            tokens += targets.numel()
            for total, lane in zip(totals, lanes, strict=True):
                gap = expected - _logs(walk, number, lane[number], start, stop)
                total[0] += float(gap.gather(2, targets.to(gap.device)).sum())
                total[1] += float((expected.exp() * gap).sum())
    for model in walk.models:
        model.drop_outside()
    return [BlockLoss(increase / tokens, divergence / tokens) for increase, divergence in totals]


@torch.no_grad()
def _logs(walk: Walk, number: int, hidden: Tensor, start: int, stop: int) -> Tensor:
    return walk.head(number, hidden, start, stop).double().log_softmax(-1)
