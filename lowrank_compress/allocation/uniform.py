"""The same kept share for every matrix."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lowrank_compress.allocation.curve import Curve
from lowrank_compress.allocation.search import loosest


def allocate(curves: Sequence[Curve], limit: int) -> np.ndarray:
    """Choose for each matrix the largest rank that keeps at most a share t of its elements, one t for all.

    t is the largest share under which Σ stored stays within the limit. A matrix whose smallest rank stores more than
    that gets its smallest rank.

    Returns
    -------
    numpy.ndarray
        (len(curves),) int64: the index of the chosen point of each curve.

    Raises
    ------
    InputError
        If even the smallest ranks exceed the limit.
    """
    shares = [curve.stored / curve.dense for curve in curves]

    def choose(share: float) -> np.ndarray:
        points = [np.searchsorted(kept, share, side="right") - 1 for kept in shares]
        return np.maximum(np.array(points, dtype=np.int64), 0)

    return loosest(curves, limit, np.unique(np.concatenate([*shares, []])), choose)
