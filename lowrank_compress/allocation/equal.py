"""The same width in every block, the best such widths under the budget."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from lowrank_compress.allocation import loss
from lowrank_compress.allocation.choice import Choices
from lowrank_compress.allocation.curve import Curve, require_reachable


def allocate(curves: Sequence[Curve], limit: int) -> np.ndarray:
    """Minimise Σ loss under Σ stored ≤ limit, where curves that differ in nothing but their block take one point.

    Such curves have one name but for its numbers, and points that store the same. Their losses are added up, and `loss`
    chooses among the sums. So every block comes out in one shape, which a stock config can describe.

    Returns
    -------
    numpy.ndarray
        (len(curves),) int64: the index of the chosen point of each curve.

    Raises
    ------
    InputError
        If even the smallest ranks exceed the limit.
    """
    require_reachable(curves, limit)
    alike: dict[object, list[int]] = {}
    for position, curve in enumerate(curves):
        points = (curve.choices.format, curve.choices.parameters.tobytes(), curve.stored.tobytes())
        alike.setdefault((re.sub(r"\d+", "*", curve.name), *points), []).append(position)
    chosen = loss.allocate([_joined([curves[i] for i in members]) for members in alike.values()], limit)
    choice = np.zeros(len(curves), dtype=np.int64)
    for members, point in zip(alike.values(), chosen, strict=True):
        choice[members] = point
    return choice


def _joined(curves: Sequence[Curve]) -> Curve:
    """Add up curves whose points are the same."""
    first, count = curves[0], len(curves)
    choices = first.choices
    together = Choices(choices.format, choices.parameters, count * choices.stored, count * choices.indices)
    return Curve(first.name, together, count * first.stored, np.sum([curve.loss for curve in curves], axis=0))
