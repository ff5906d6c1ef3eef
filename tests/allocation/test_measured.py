"""Corrected curves: what was measured at the points where it was, and curves like all others between."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank_compress.allocation.measured import MOST, SHARES, corrected, correction, point_at
from tests.allocation.curves import STORAGES, random_curves, ranked


@settings(deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), storage=st.sampled_from(STORAGES), share=st.floats(0, 1))
def test_a_point_is_the_largest_within_a_share(seed: int, storage: str, share: float) -> None:
    (curve,) = random_curves(seed, 1, storage)
    within = [number for number, stored in enumerate(curve.stored) if stored <= share * curve.dense]
    assert point_at(curve, share) == (within[-1] if within else 0)


def test_losses_are_those_that_were_measured_and_log_linear_between() -> None:
    curve = ranked("w", np.array([10, 30, 50, 70, 100]), np.array([8.0, 4.0, 2.0, 1.0, 0.0]))
    found = corrected(curve, {0.3: correction(12.0, 4.0), 0.7: correction(0.75, 1.0)})
    between = 2.0 * math.sqrt(3 * 0.75)
    assert found.loss == pytest.approx([24.0, 12.0, between, 0.75, 0.0])
    assert found.stored is curve.stored
    assert corrected(curve, {}) is curve


def test_a_loss_that_would_rise_with_what_is_stored_stands_for_less_too() -> None:
    curve = ranked("w", np.array([10, 50, 100]), np.array([2.0, 1.0, 0.0]))
    found = corrected(curve, {0.1: 1.0, 0.5: 5.0})
    assert found.loss.tolist() == pytest.approx([5.0, 5.0, 0.0])


@settings(deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), storage=st.sampled_from(STORAGES), logs=st.lists(st.floats(-3, 3), min_size=4))
def test_any_correction_gives_a_curve_no_lower_than_asked(seed: int, storage: str, logs: list[float]) -> None:
    (curve,) = random_curves(seed, 1, storage)
    corrections = {share: math.exp(log) for share, log in zip(SHARES, logs, strict=False)}
    found = corrected(curve, corrections)
    assert (np.diff(found.loss) <= 0).all()
    for share, factor in corrections.items():
        for stored, before, after in zip(curve.stored, curve.loss, found.loss, strict=True):
            if stored == share * curve.dense:
                assert after >= before * factor * (1 - 1e-12)


@pytest.mark.parametrize(
    ("measured", "predicted", "expected"),
    [
        (3.0, 2.0, 1.5),
        (-0.1, 2.0, 1 / MOST),
        (math.inf, 2.0, MOST),
        (1.0, 1e-9, MOST),
        (1.0, 0.0, 1.0),
        (math.nan, 1.0, 1.0),
    ],
)
def test_a_correction_is_a_bounded_ratio(measured: float, predicted: float, expected: float) -> None:
    assert correction(measured, predicted) == pytest.approx(expected)
