from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank_compress.allocation.budget import Budget
from lowrank_compress.errors import InputError
from tests.allocation.curves import random_curves


@settings(deadline=None)
@given(ratio=st.floats(1e-6, 1 - 1e-6), denominator=st.integers(1, 10**12), other=st.floats(0, 1))
def test_the_limit_is_the_largest_that_reaches_the_ratio(ratio: float, denominator: int, other: float) -> None:
    budget = Budget(ratio, denominator, int(other * denominator))
    removed = denominator - budget.other - budget.limit
    assert Fraction(removed, denominator) >= Fraction(str(ratio)) > Fraction(removed - 1, denominator)
    assert budget.reached(budget.limit) >= ratio


def test_a_ratio_is_the_decimal_number_that_was_written() -> None:
    assert Budget(0.9, 10, 0).limit == 1
    assert Budget(0.3, 10, 2).limit == 5
    assert Budget(0.3, 10, 2).reached(5) == 0.3


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.1, 20, float("nan")])
def test_ratio_out_of_range(ratio: float) -> None:
    with pytest.raises(InputError, match=rf"must lie between 0 and 1, got {ratio}"):
        Budget(ratio, 10, 0)


def test_impossible_counts() -> None:
    with pytest.raises(InputError, match="over 10 elements cannot leave 11"):
        Budget(0.5, 10, 11)


def test_out_of_reach_names_the_largest_ratio_and_that_one_works() -> None:
    curves = random_curves(0, 3, "pivot")
    dense = sum(curve.dense for curve in curves)
    with pytest.raises(
        InputError, match=r"A ratio of 0\.99 is out of reach: .* largest reachable ratio is 0\.\d+"
    ) as caught:
        Budget(0.99, dense + 50, 50).check(curves)
    largest = float(str(caught.value).split("ratio is ")[1].split(". ")[0])
    Budget(largest, dense + 50, 50).check(curves)
    with pytest.raises(InputError, match="out of reach"):
        Budget(largest + 2e-4, dense + 50, 50).check(curves)


def test_curves_of_another_model() -> None:
    curves = random_curves(0, 3, "pivot")
    dense = sum(curve.dense for curve in curves)
    with pytest.raises(
        InputError, match=f"counts {dense + 7} elements, but the matrices to compress have {dense} and 6"
    ):
        Budget(0.1, dense + 7, 6).check(curves)
