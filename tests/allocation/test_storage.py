from __future__ import annotations

import numpy as np
import pytest

from lowrank_compress.allocation.storage import FORMATS, STORAGES, cost, largest_rank
from lowrank_compress.errors import InputError

SHAPES = [(1, 1), (1, 7), (5, 8), (8, 8), (8, 5), (30, 4)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_costs_are_the_elements_of_the_tensors(shape: tuple[int, int]) -> None:
    m, n = shape
    for rank in range(1, min(shape) + 1):
        pair = np.empty((m, rank)).size + np.empty((rank, n)).size
        pivot = np.empty((rank, n)).size + np.empty((m - rank, rank)).size + np.empty(rank).size
        assert cost("pair", shape, rank) == pair
        assert cost("pivot", shape, rank) == pivot
        assert cost("auto", shape, rank) == min(pair, pivot)
        assert cost("dense", shape, rank) == m * n


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("multiple", [1, 2, 3, 8])
def test_costs_rise_with_the_rank_and_invert(storage: str, shape: tuple[int, int], multiple: int) -> None:
    ranks = np.arange(1, min(shape) + 1)
    costs = cost(storage, shape, ranks)
    assert costs.dtype == np.int64
    assert costs.tolist() == [cost(storage, shape, int(rank)) for rank in ranks]
    assert np.all(np.diff(costs) > 0)
    for stored in range(int(costs[-1]) + 2):
        fitting = [rank for rank in ranks.tolist() if cost(storage, shape, rank) <= stored and rank % multiple == 0]
        assert largest_rank(storage, shape, stored, multiple) == max(fitting, default=0)
        assert largest_rank(storage, shape, stored) == largest_rank(storage, shape, stored, 1)


def test_an_int_stays_an_int() -> None:
    assert all(type(cost(storage, (5, 8), 2)) is int for storage in (*FORMATS, "auto"))


def test_unknown_storage() -> None:
    with pytest.raises(InputError, match=r"Unknown storage 'pivots'\. Did you mean 'pivot'"):
        cost("pivots", (4, 4), 1)
