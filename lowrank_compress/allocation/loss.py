"""The least predicted loss under the budget."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np

from lowrank_compress.allocation import uniform
from lowrank_compress.allocation.curve import Curve, require_reachable, stored_total
from lowrank_compress.errors import InputError


def allocate(curves: Sequence[Curve], limit: int, *, floor: float = 0.0) -> np.ndarray:
    """Minimise Σ loss under Σ stored ≤ limit; the curves' losses must share a unit.

    Dense is a point like any other. The segments of the curves' lower convex hulls (over stored elements and loss) are
    taken in the order of loss saved for each element. As long as they fit, that is the optimum for what they store
    (Everett, Operations Research 11, 1963; Shoham and Gersho, IEEE TASSP 36, 1988). What the first one that does not
    fit leaves over is filled with the steepest moves that do, to any point of any curve.

    Parameters
    ----------
    curves
        The matrices.
    limit
        The largest Σ stored.
    floor
        In [0, 1]: every matrix stores at least this share of what ``uniform`` would give it.

    Returns
    -------
    numpy.ndarray
        (len(curves),) int64: the index of the chosen point of each curve.

    Raises
    ------
    InputError
        If even the smallest ranks exceed the limit, or the floor lies outside [0, 1].
    """
    if not 0 <= floor <= 1:
        raise InputError(f"The floor is a share of the uniform budget and must lie in [0, 1], got {floor}.")
    require_reachable(curves, limit)
    choice = np.zeros(len(curves), dtype=np.int64)
    if floor > 0:
        for position, (curve, point) in enumerate(zip(curves, uniform.allocate(curves, limit), strict=True)):
            choice[position] = np.searchsorted(curve.stored, floor * curve.stored[point], side="left")
    left = limit - stored_total(curves, choice)
    hulls = [lower_hull(curve, int(start)) for curve, start in zip(curves, choice, strict=True)]
    owner = np.repeat(np.arange(len(curves)), [len(hull) - 1 for hull in hulls])
    if len(owner):
        target = np.concatenate([hull[1:] for hull in hulls])
        spent = np.concatenate([np.diff(curve.stored[hull]) for curve, hull in zip(curves, hulls, strict=True)])
        saved = np.concatenate([-np.diff(curve.loss[hull]) for curve, hull in zip(curves, hulls, strict=True)])
        # Stable: equal slopes are taken in the order of the curves, and along a curve.
        order = np.argsort(-saved / spent, kind="stable")
        order = order[: np.searchsorted(np.cumsum(spent[order]), left, side="right")]
        np.maximum.at(choice, owner[order], target[order])
        left -= int(spent[order].sum())
    _fill(curves, choice, left)
    return choice


def lower_hull(curve: Curve, start: int) -> np.ndarray:
    """Return the indices of the vertices of the lower convex hull of points start …, up to the first of least loss."""
    stored, loss = curve.stored[start:].tolist(), curve.loss[start:].tolist()
    hull: list[int] = []
    slopes: list[float] = []
    for point in range(len(stored)):
        slope = 0.0
        while hull:
            slope = (loss[point] - loss[hull[-1]]) / (stored[point] - stored[hull[-1]])
            if not slopes or slope > slopes[-1]:
                break
            hull.pop()
            slopes.pop()
        if hull:
            slopes.append(slope)
        hull.append(point)
    while slopes and slopes[-1] >= 0:
        slopes.pop()
        hull.pop()
    return np.array(hull, dtype=np.int64) + start


def _fill(curves: Sequence[Curve], choice: np.ndarray, left: int) -> None:
    """Spend ``left`` elements on the steepest moves that fit, changing ``choice``."""

    def steepest(position: int) -> tuple[float, int, int] | None:
        curve, now = curves[position], choice[position]
        end = np.searchsorted(curve.stored, curve.stored[now] + left, side="right")
        if end <= now + 1:
            return None
        slopes = (curve.loss[now + 1 : end] - curve.loss[now]) / (curve.stored[now + 1 : end] - curve.stored[now])
        best = int(slopes.argmin())
        return (float(slopes[best]), position, int(now + 1 + best)) if slopes[best] < 0 else None

    moves = [move for position in range(len(curves)) if (move := steepest(position))]
    heapq.heapify(moves)
    while moves:
        _, position, target = heapq.heappop(moves)
        spent = int(curves[position].stored[target] - curves[position].stored[choice[position]])
        if spent <= left:
            choice[position] = target
            left -= spent
        if move := steepest(position):
            heapq.heappush(moves, move)
