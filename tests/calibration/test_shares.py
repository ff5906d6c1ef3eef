"""Shares of several texts in a number of windows."""

from __future__ import annotations

from fractions import Fraction
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowrank_compress.calibration.shares import most, shares


@given(st.lists(st.integers(1, 5), min_size=1, max_size=3), st.integers(0, 12))
def test_no_other_parts_are_nearer_to_the_shares(weights: list[int], total: int) -> None:
    def error(parts: tuple[int, ...]) -> Fraction:
        return sum(
            (abs(part - Fraction(weight * total, sum(weights))) for part, weight in zip(parts, weights, strict=True)),
            Fraction(0),
        )

    found = tuple(shares(weights, total))
    assert sum(found) == total
    others = [parts for parts in product(range(total + 1), repeat=len(weights)) if sum(parts) == total]
    assert error(found) == min(map(error, others))


@pytest.mark.parametrize(
    ("weights", "total", "expected"),
    [([1], 7, [7]), ([2, 1], 6, [4, 2]), ([1, 1], 3, [2, 1]), ([0.1, 0.2, 0.7], 10, [1, 2, 7]), ([3, 1], 1, [1, 0])],
)
def test_shares(weights: list[float], total: int, expected: list[int]) -> None:
    assert shares(weights, total) == expected


@pytest.mark.parametrize(
    ("weights", "there", "expected"),
    [([1.0], [7], [7]), ([2.0, 1.0], [10, 9], [10, 5]), ([1.0, 3.0], [10, 9], [3, 9]), ([0.1, 0.2], [3, 6], [3, 6])],
)
def test_as_many_as_are_there_in_proportion(weights: list[float], there: list[int], expected: list[int]):
    assert most(weights, there) == expected
