from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank_compress.allocation import loss, uniform
from lowrank_compress.allocation.curve import Curve, stored_total
from lowrank_compress.errors import InputError
from tests import reference
from tests.allocation.curves import STORAGES, factorized, random_curves, ranked, some_limit

laws = settings(deadline=None, derandomize=True)


def predicted(curves: list[Curve], choice: np.ndarray) -> float:
    return float(sum(curve.loss[point] for curve, point in zip(curves, choice, strict=True)))


@laws
@given(seed=st.integers(0, 10**6), count=st.integers(1, 4), storage=st.sampled_from(STORAGES), share=st.floats(0, 1))
def test_within_one_hull_step_of_the_linear_program(seed: int, count: int, storage: str, share: float) -> None:
    curves = random_curves(seed, count, storage)
    limit = some_limit(curves, share)
    found = predicted(curves, loss.allocate(curves, limit))
    bound = reference.relaxed_loss(curves, limit)
    step = max((saved for curve in curves for saved in reference.hull_steps(curve)), default=0.0)
    scale = 1e-9 * sum(curve.loss[0] for curve in curves)
    assert bound - scale <= found <= bound + step + scale


@laws
@given(seed=st.integers(0, 10**6), count=st.integers(1, 3), storage=st.sampled_from(STORAGES), share=st.floats(0, 1))
def test_between_brute_force_and_the_linear_program(seed: int, count: int, storage: str, share: float) -> None:
    curves = random_curves(seed, count, storage, largest=9)
    limit = some_limit(curves, share)
    found, best = predicted(curves, loss.allocate(curves, limit)), reference.best_choice(curves, limit)
    step = max((saved for curve in curves for saved in reference.hull_steps(curve)), default=0.0)
    assert best * (1 - 1e-12) <= found <= best + step * (1 + 1e-12)


@laws
@given(seed=st.integers(0, 10**6), count=st.integers(1, 4), steps=st.integers(0, 20))
def test_equals_brute_force_where_curves_are_convex_and_steps_cost_the_same(seed: int, count: int, steps: int) -> None:
    rng = np.random.default_rng(seed)
    curves = []
    for position in range(count):
        points = int(rng.integers(2, 7))
        saved = np.sort(rng.exponential(size=points - 1))[::-1]
        losses = np.append(np.cumsum(saved[::-1])[::-1], 0.0)
        curves.append(ranked(f"w{position}", 10 * np.arange(1, points + 1), losses))
    limit = 10 * count + 10 * steps
    assert predicted(curves, loss.allocate(curves, limit)) == pytest.approx(reference.best_choice(curves, limit))


@laws
@given(
    seed=st.integers(0, 10**6),
    storage=st.sampled_from(STORAGES),
    share=st.floats(0, 1),
    floor=st.sampled_from([0.3, 0.8, 1.0]),
)
def test_floor(seed: int, storage: str, share: float, floor: float) -> None:
    curves = random_curves(seed, 4, storage)
    limit = some_limit(curves, share)
    choice, even = loss.allocate(curves, limit, floor=floor), uniform.allocate(curves, limit)
    assert stored_total(curves, choice) <= limit
    for curve, point, base in zip(curves, choice, even, strict=True):
        assert curve.stored[point] >= floor * curve.stored[base]
    # A floor at the whole uniform budget can only add to it.
    if floor == 1:
        assert predicted(curves, choice) <= predicted(curves, even)


@laws
@given(seed=st.integers(0, 10**6), storage=st.sampled_from(STORAGES), start=st.integers(0, 2))
def test_hull(seed: int, storage: str, start: int) -> None:
    curve = random_curves(seed, 1, storage)[0]
    start = min(start, len(curve) - 1)
    rest = ranked("rest", curve.stored[start:], curve.loss[start:])
    hull = loss.lower_hull(curve, start)
    assert hull[0] == start
    np.testing.assert_allclose(-np.diff(curve.loss[hull]), reference.hull_steps(rest), rtol=1e-9)


def test_what_the_hull_leaves_over_is_used() -> None:
    """Dense hides every rank from the hull, but does not fit."""
    curve = ranked("w", np.array([10, 20, 30, 32]), np.array([9.0, 8.0, 7.0, 0.0]))
    assert loss.lower_hull(curve, 0).tolist() == [0, 3]
    assert loss.allocate([curve], 31).tolist() == [2]
    assert loss.allocate([curve], 29).tolist() == [1]
    assert loss.allocate([curve], 32).tolist() == [3]


def test_nothing_is_spent_on_nothing() -> None:
    """A weight of rank 2 needs no more than rank 2."""
    curve = factorized("w", (9, 9), np.array([5.0, 1.0] + [0.0] * 8), "pair")
    assert curve.ranks[loss.allocate([curve], curve.dense)].tolist() == [2]


def test_equal_curves_are_served_in_order() -> None:
    curves = random_curves(0, 1, "pair") * 3
    hull = loss.lower_hull(curves[0], 0)
    spent = int(curves[0].stored[hull[1]] - curves[0].stored[0])
    limit = some_limit(curves, 0) + spent
    assert loss.allocate(curves, limit).tolist() == [hull[1], 0, 0]


def test_a_large_model_uses_its_budget() -> None:
    rng = np.random.default_rng(0)
    curves = []
    for position in range(300):
        shape = ((4096, 4096), (14336, 4096))[position % 2]
        storage = STORAGES[position % len(STORAGES)]
        values = np.sort(rng.exponential(size=4096) * rng.uniform(0.5, 2))[::-1]
        tail = np.append(np.cumsum(values[::-1])[::-1], 0.0)
        curves.append(factorized(f"w{position}", shape, tail, storage))
    limit = some_limit(curves, 0.6)
    choice = loss.allocate(curves, limit)
    assert 0 <= limit - stored_total(curves, choice) < 14336 + 4096


def test_impossible_floor() -> None:
    with pytest.raises(InputError, match=r"must lie in \[0, 1\], got 1.2"):
        loss.allocate([], 0, floor=1.2)
