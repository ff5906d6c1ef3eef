"""Search for one threshold that is common to all matrices."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from lowrank_compress.allocation.curve import Curve, require_reachable, stored_total


def loosest(
    curves: Sequence[Curve], limit: int, thresholds: np.ndarray, choose: Callable[[float], np.ndarray]
) -> np.ndarray:
    """Return the choice of the last threshold whose stored total stays within the limit.

    Parameters
    ----------
    curves
        The matrices.
    limit
        The largest Σ stored.
    thresholds
        Ordered so that no matrix stores less under a later one; all points at which any choice changes.
    choose
        The point index of every curve, (len(curves),), under a threshold. If no threshold fits, every curve gets its
        cheapest point.

    Raises
    ------
    InputError
        If the cheapest points exceed the limit.
    """
    require_reachable(curves, limit)
    best = np.zeros(len(curves), dtype=np.int64)
    low, high = 0, len(thresholds)
    while low < high:
        middle = (low + high) // 2
        choice = choose(float(thresholds[middle]))
        if stored_total(curves, choice) <= limit:
            best, low = choice, middle + 1
        else:
            high = middle
    return best
