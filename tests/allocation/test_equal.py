from __future__ import annotations

import itertools

import numpy as np

from lowrank_compress.allocation import equal
from lowrank_compress.allocation.curve import Curve, stored_total
from tests.allocation.curves import ranked, some_limit


def curves_of(blocks: int, seed: int) -> list[Curve]:
    """Two modules a block, with convex losses of their own and steps of one size, so that greed is optimal."""
    rng = np.random.default_rng(seed)
    made = []
    for block in range(blocks):
        for kind in ("mlp", "attn"):
            saved = np.sort(rng.exponential(size=5))
            loss = np.append(np.cumsum(saved)[::-1], 0.0)
            made.append(ranked(f"layers.{block}.{kind}", 10 * np.arange(1, 7), loss, block=block))
    return made


def test_the_best_equal_points_by_brute_force() -> None:
    for seed in range(20):
        curves = curves_of(3, seed)
        limit = some_limit(curves, 0.55)
        choice = equal.allocate(curves, limit)

        def loss(points: np.ndarray, curves: list[Curve] = curves) -> float:
            return sum(float(curve.loss[point]) for curve, point in zip(curves, points, strict=True))

        every = [np.tile(pair, 3) for pair in itertools.product(range(6), repeat=2)]
        best = min((points for points in every if stored_total(curves, points) <= limit), key=loss)
        assert choice.tolist() == best.tolist()


def test_one_kind_of_module_gets_the_widest_that_fits() -> None:
    curves = curves_of(4, 0)[::2]
    assert equal.allocate(curves, 4 * 30 + 39).tolist() == [2] * 4


def test_other_points_or_names_are_chosen_by_themselves() -> None:
    loss = np.array([5.0, 1.0, 0.0])
    curves = [
        ranked("layers.0.mlp", np.array([10, 20, 30]), loss),
        ranked("layers.1.mlp", np.array([11, 21, 31]), 0.01 * loss),
        ranked("layers.2.mlp", np.array([10, 20, 30]), loss),
    ]
    assert equal.allocate(curves, 20 + 11 + 20).tolist() == [1, 0, 1]
