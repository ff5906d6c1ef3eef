"""The choice between alternatives, against all combinations of them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank_compress.allocation import loss
from lowrank_compress.allocation.alternatives import choose
from lowrank_compress.allocation.choice import of_ranks
from lowrank_compress.allocation.curve import Curve, make_curve

Sites = list[list[list[Curve]]]


def curve(seed: int, dense: int, points: int) -> Curve:
    """Make a convex curve, as matrices and modules have."""
    rng = np.random.default_rng(seed)
    falls = np.sort(rng.exponential(size=points))[::-1]
    losses = np.append(falls[::-1].cumsum()[::-1][1:], 0.0)
    ranks = np.arange(1, points)
    return make_curve("c", dense, of_ranks("pair", ranks, ranks * dense // points), losses[: points - 1])


@st.composite
def some_sites(draw: st.DrawFn) -> Sites:
    sites = []
    for _ in range(draw(st.integers(1, 4))):
        sizes = draw(st.lists(st.integers(40, 200), min_size=1, max_size=3))
        seeds = st.integers(0, 10_000)
        split = [curve(draw(seeds), size, 12) for size in sizes]
        whole = [curve(draw(seeds), sum(sizes), 20)]
        sites.append([split, whole] if draw(st.booleans()) else [split])
    return sites


def loss_of(sites: Sites, picked: Sequence[int], limit: int) -> float:
    curves = [curve for site, number in zip(sites, picked, strict=True) for curve in site[number]]
    points = loss.allocate(curves, limit)
    return sum(float(curve.loss[point]) for curve, point in zip(curves, points, strict=True))


@settings(max_examples=40)
@given(some_sites(), st.floats(0.45, 0.95))
def test_is_the_best_combination_but_for_one_step(sites: Sites, share: float) -> None:
    limit = int(share * sum(curve.dense for site in sites for curve in site[0]))
    picked = choose(sites, limit)
    best = min(loss_of(sites, every, limit) for every in itertools.product(*(range(len(site)) for site in sites)))
    # A multiplier finds the hull of all combinations: what it misses is at most one segment of one curve.
    step = max(float(-np.diff(curve.loss).min()) for site in sites for curves in site for curve in curves)
    assert best <= loss_of(sites, picked, limit) <= best + step


def test_takes_what_loses_less_everywhere() -> None:
    split = [curve(1, 100, 10), curve(2, 100, 10)]
    ranks = np.arange(1, 10)
    better = [make_curve("m", 200, of_ranks("pair", ranks, ranks * 20), np.full(9, 1e-6))]
    worse = [make_curve("m", 200, of_ranks("pair", ranks, ranks * 20), np.full(9, 1e6))]
    assert choose([[split, better], [split, worse], [split]], 450) == [1, 0, 0]


def test_the_price_decides() -> None:
    """One alternative is better where much is removed, the other where little is."""
    ranks = np.array([1])
    thrifty = [make_curve("a", 100, of_ranks("pair", ranks, np.array([20])), np.array([3.0]))]
    careful = [make_curve("b", 100, of_ranks("pair", ranks, np.array([80])), np.array([0.1]))]
    assert choose([[thrifty, careful]], 85) == [1]
    assert choose([[thrifty, careful]], 25) == [0]


def test_without_alternatives_there_is_nothing_to_choose() -> None:
    assert choose([[[curve(1, 100, 10)]], [[curve(2, 100, 10)]]], 0) == [0, 0]
