from __future__ import annotations

import numpy as np
import pytest

from lowrank_compress.allocation.curve import DENSE, Curve, make_curve, require_reachable, stored_total
from lowrank_compress.allocation.storage import STORAGES, cost
from lowrank_compress.errors import InputError
from tests.allocation.curves import factorized, random_curves


def curve(ranks: list[int], stored: list[int], loss: list[float]) -> Curve:
    return Curve("w", np.array(ranks), np.array(stored), np.array(loss))


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (6, 9), (9, 9), (9, 6)], ids=str)
def test_a_factorized_matrix_has_every_rank_that_pays_and_dense(shape: tuple[int, int], storage: str) -> None:
    tail = np.linspace(1, 0, min(shape) + 1)
    found = factorized("w", shape, tail, storage)
    paying = [rank for rank in range(1, min(shape) + 1) if cost(storage, shape, rank) < shape[0] * shape[1]]
    assert found.ranks.tolist() == [*paying, DENSE]
    assert found.stored.tolist() == [*(cost(storage, shape, rank) for rank in paying), shape[0] * shape[1]]
    assert found.loss.tolist() == [*(tail[rank] for rank in paying), 0.0]
    assert found.dense == shape[0] * shape[1]
    assert len(found) == len(paying) + 1


def test_a_partial_tail_gives_the_ranks_it_has() -> None:
    found = factorized("w", (9, 9), np.array([3.0, 2.0, 1.0]), "pair")
    assert found.ranks.tolist() == [1, 2, DENSE]
    assert found.loss.tolist() == [2.0, 1.0, 0.0]


@pytest.mark.parametrize(("dense", "ranks"), [(50, [4, 8, 12, DENSE]), (30, [4, 8, DENSE]), (10, [DENSE])])
def test_a_module_has_the_candidates_that_pay_and_dense(dense: int, ranks: list[int]) -> None:
    spectrum = np.array([2.0, 1.0])
    found = make_curve(
        "m",
        dense,
        np.array([4, 8, 12]),
        np.array([10, 20, 30]),
        np.array([9.0, 5.0, 5.0]),
        spectrum=spectrum,
        block=3,
        influence=0.25,
    )
    assert found.ranks.tolist() == ranks
    assert found.stored.tolist() == [*[10, 20, 30][: len(ranks) - 1], dense]
    assert found.loss.tolist() == [*[9.0, 5.0, 5.0][: len(ranks) - 1], 0.0]
    assert (found.name, found.dense, found.block, found.influence) == ("m", dense, 3, 0.25)
    assert found.spectrum is spectrum


def test_candidates_that_are_no_curve() -> None:
    three = np.array([1, 2, 3])
    with pytest.raises(InputError, match="losses that never rise"):
        make_curve("m", 50, three, 10 * three, np.array([1.0, 2.0, 0.5]))
    with pytest.raises(InputError, match="stored counts that strictly rise"):
        make_curve("m", 50, three, np.array([20, 10, 30]), np.zeros(3))
    with pytest.raises(InputError, match="one rank, stored count and loss"):
        make_curve("m", 50, three, 10 * three, np.zeros(2))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (([1, DENSE], [3], [1.0, 0.0]), "one rank, stored count and loss for each point"),
        (([], [], []), "one rank, stored count and loss for each point"),
        (([1, 2], [3, 4], [1.0, 0.0]), r"end in DENSE \(-1\), got \[1 2\]"),
        (([2, 1, DENSE], [3, 4, 5], [2.0, 1.0, 0.0]), r"ranks that rise from 1 or more"),
        (([0, DENSE], [3, 4], [2.0, 0.0]), r"ranks that rise from 1 or more"),
        (([1, DENSE], [4, 4], [2.0, 0.0]), r"stored counts that strictly rise, got \[4 4\]"),
        (([1, 2, DENSE], [3, 4, 5], [1.0, 2.0, 0.0]), r"losses that never rise"),
        (([1, DENSE], [3, 4], [2.0, 1.0]), r"losses that never rise and end in 0"),
        (([1, DENSE], [3, 4], [np.nan, 0.0]), r"finite losses"),
    ],
)
def test_what_is_no_curve(arrays: tuple[list[int], list[int], list[float]], message: str) -> None:
    with pytest.raises(InputError, match=rf"The curve of w is not one: expected .*{message}"):
        curve(*arrays)


def test_totals() -> None:
    curves = random_curves(0, 3, "pair")
    assert stored_total(curves, np.zeros(3, dtype=np.int64)) == sum(int(one.stored[0]) for one in curves)
    least = stored_total(curves, np.zeros(3, dtype=np.int64))
    require_reachable(curves, least)
    with pytest.raises(InputError, match=rf"3 matrices cannot be stored in {least - 1} elements: .* need {least}"):
        require_reachable(curves, least - 1)
