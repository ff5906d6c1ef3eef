"""How many hidden states a walk keeps at once, and every how many blocks, so that they fit."""

from __future__ import annotations

from collections.abc import Sequence

from lowrank_compress.model.skeleton import Skeleton
from lowrank_compress.model.walk.batch import Batch


def boundary_bytes(skeleton: Skeleton, batches: Sequence[Batch]) -> int:
    """Bytes of the hidden states of all batches between two blocks."""
    positions = sum(batch.ids.numel() for batch in batches)
    return positions * skeleton.model.config.hidden_size * skeleton.dtype.itemsize


def segment_length(blocks: int, limit: int) -> int:
    """Every how many blocks states are kept, so that no more than `limit` boundaries are at once, or else the fewest.

    All blocks of a segment are run a second time where it is longer than 1.
    """
    lengths = range(1, blocks + 1)
    return next((s for s in lengths if most_kept(blocks, s) <= limit), min(lengths, key=lambda s: most_kept(blocks, s)))


def most_kept(blocks: int, segment: int) -> int:
    """Boundaries at once: starts of segments, the inside of one, and the gradients of one before and after a block."""
    return -(-blocks // segment) + segment - 1 + 2
