"""Which of several ways to store a part of a model: the one that loses less at the common price of an element."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lowrank_compress.allocation.curve import Curve

STEPS = 64  # of bisection; the price is then known to far more digits than could change a choice


def choose(sites: Sequence[Sequence[Sequence[Curve]]], limit: int) -> list[int]:
    """Choose an alternative for each site, so that Σ loss is least under Σ stored ≤ limit.

    By a Lagrange multiplier, the price of an element (Everett, Operations Research 11, 1963): at a price every site
    takes the alternative, and every curve of it the point, with the least loss + price · stored. The price is the
    lowest at which what is taken fits the limit.

    Parameters
    ----------
    sites
        For each site its alternatives, each the curves of what it consists of. All losses must share a unit.
    limit
        The largest Σ stored.

    Returns
    -------
    list of int
        The index of the alternative of each site; the first of several that are equally good.
    """
    if all(len(alternatives) == 1 for alternatives in sites):
        return [0] * len(sites)
    largest = sum(float(curve.loss[0]) for site in sites for curves in site for curve in curves)
    # At a price of all losses an element everything takes its cheapest way and point.
    low, high = np.log(max(largest, 1e-300)) - 80.0, np.log(max(largest, 1e-300)) + 1.0
    for _ in range(STEPS):
        middle = (low + high) / 2
        if _at_price(sites, float(np.exp(middle)))[1] <= limit:
            high = middle
        else:
            low = middle
    return _at_price(sites, float(np.exp(high)))[0]


def _at_price(sites: Sequence[Sequence[Sequence[Curve]]], price: float) -> tuple[list[int], int]:
    """Return the best alternative of each site at a price, and what all of them together store."""
    chosen, total = [], 0
    for alternatives in sites:
        found = []
        for curves in alternatives:
            points = [int(np.argmin(curve.loss + price * curve.stored)) for curve in curves]
            stored = sum(int(curve.stored[point]) for curve, point in zip(curves, points, strict=True))
            loss = sum(float(curve.loss[point]) for curve, point in zip(curves, points, strict=True))
            found.append((loss + price * stored, stored))
        best = min(range(len(found)), key=lambda number: found[number][0])
        chosen.append(best)
        total += found[best][1]
    return chosen, total
