from __future__ import annotations

import numpy as np
import pytest

from lowrank_compress.allocation.choice import DENSE, Choice, Choices, of_ranks
from lowrank_compress.allocation.curve import Curve, make_curve, require_reachable, stored_total
from lowrank_compress.errors import InputError
from lowrank_compress.formats.table import FORMATS, choices_of
from tests.allocation.curves import STORAGES, factorized, random_curves


def curve(stored: list[int], loss: list[float], choices: int) -> Curve:
    ranks = np.arange(1, choices + 1)
    return Curve("w", of_ranks("pair", ranks, ranks), np.array(stored), np.array(loss))


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (6, 9), (9, 9), (9, 6)], ids=str)
def test_a_factorized_matrix_has_every_choice_that_pays_and_dense(shape: tuple[int, int], storage: str) -> None:
    found = factorized("w", shape, np.linspace(1, 0, min(shape) + 1), storage)
    paying = choices_of(FORMATS[storage], shape)
    assert found.stored.tolist() == [*paying.stored.tolist(), shape[0] * shape[1]]
    assert [found.choice(point) for point in range(len(found))] == [*paying, DENSE]
    assert found.choice(-1) == DENSE
    assert found.dense == shape[0] * shape[1]


def test_a_partial_tail_gives_the_ranks_it_has() -> None:
    found = factorized("w", (9, 9), np.array([3.0, 2.0, 1.0]), "pair")
    assert found.ranks.tolist() == [1, 2]
    assert found.loss.tolist() == [2.0, 1.0, 0.0]


@pytest.mark.parametrize(("dense", "ranks"), [(50, [4, 8, 12]), (30, [4, 8]), (10, [])])
def test_a_module_has_the_candidates_that_pay_and_dense(dense: int, ranks: list[int]) -> None:
    spectrum = np.array([2.0, 1.0])
    found = make_curve(
        "m",
        dense,
        of_ranks("width", np.array([4, 8, 12]), np.array([10, 20, 30])),
        np.array([9.0, 5.0, 5.0]),
        spectrum=spectrum,
        block=3,
        influence=0.25,
    )
    assert [found.choice(point) for point in range(len(found))] == [*(Choice("width", (r,)) for r in ranks), DENSE]
    assert found.stored.tolist() == [*[10, 20, 30][: len(ranks)], dense]
    assert found.loss.tolist() == [*[9.0, 5.0, 5.0][: len(ranks)], 0.0]
    assert (found.name, found.dense, found.block, found.influence) == ("m", dense, 3, 0.25)
    assert found.spectrum is spectrum


def test_of_a_grid_of_two_parameters_only_what_beats_all_cheaper_ones_is_a_point() -> None:
    grid = np.array([[1, 1], [1, 2], [2, 1], [2, 2], [3, 3]])
    stored = np.array([10, 20, 20, 40, 90])
    loss = np.array([9.0, 8.0, 5.0, 6.0, 1.0])
    found = make_curve("g", 50, Choices("atoms", grid, stored, stored // 2), loss)
    assert [found.choice(point) for point in range(len(found))] == [
        Choice("atoms", (1, 1)),
        Choice("atoms", (2, 1)),
        DENSE,
    ]
    assert found.loss.tolist() == [9.0, 5.0, 0.0]
    assert found.choices.indices.tolist() == [5, 10]


def test_candidates_that_are_no_curve() -> None:
    three = np.array([1, 2, 3])
    with pytest.raises(InputError, match="losses that never rise"):
        make_curve("m", 50, of_ranks("pair", three, 10 * three), np.array([1.0, 2.0, 0.5]))
    with pytest.raises(InputError, match="stored counts that strictly rise"):
        make_curve("m", 50, of_ranks("pair", three, np.array([20, 10, 30])), np.zeros(3))


@pytest.mark.parametrize(
    ("stored", "loss", "choices", "message"),
    [
        ([3], [1.0, 0.0], 1, "a stored count and a loss for each choice and for dense"),
        ([], [], 0, "a stored count and a loss for each choice"),
        ([3, 4], [1.0, 0.0], 2, "a stored count and a loss for each choice"),
        ([4, 4], [2.0, 0.0], 1, r"stored counts that strictly rise, got \[4 4\]"),
        ([3, 4, 5], [1.0, 2.0, 0.0], 2, r"losses that never rise"),
        ([3, 4], [2.0, 1.0], 1, r"losses that never rise and end in 0"),
        ([3, 4], [np.nan, 0.0], 1, r"finite losses"),
    ],
)
def test_what_is_no_curve(stored: list[int], loss: list[float], choices: int, message: str) -> None:
    with pytest.raises(InputError, match=rf"The curve of w is not one: expected .*{message}"):
        curve(stored, loss, choices)


def test_totals() -> None:
    curves = random_curves(0, 3, "pair")
    assert stored_total(curves, np.zeros(3, dtype=np.int64)) == sum(int(one.stored[0]) for one in curves)
    least = stored_total(curves, np.zeros(3, dtype=np.int64))
    require_reachable(curves, least)
    with pytest.raises(InputError, match=rf"3 matrices cannot be stored in {least - 1} elements: .* need {least}"):
        require_reachable(curves, least - 1)
