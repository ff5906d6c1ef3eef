"""Predictions of what rounding costs, against errors of single elements and loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lowrank_compress.allocation.choice import Choice
from lowrank_compress.formats.packed import Packing
from lowrank_compress.formats.spec import Product
from lowrank_compress.formats.table import FORMATS, rebuild
from lowrank_compress.linalg.quantize import SHRINKS, rounded, searched
from lowrank_compress.linalg.weighted import Projector
from lowrank_compress.methods.few_bits import Piece, pieces, rounding_losses

PACKING = Packing(4, True, torch.bfloat16)


def product(m: int = 6, n: int = 9) -> Product:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(m, n, dtype=torch.float64, generator=generator)
    values, vectors = torch.linalg.eigh(weight @ weight.T)
    expand = vectors.flip(1)
    sides = (
        torch.rand(m, dtype=torch.float64, generator=generator),
        torch.rand(n, dtype=torch.float64, generator=generator),
    )
    projector = Projector(values.flip(0), float(values.sum()), expand, expand.T)
    return Product("matrix", weight, projector, sides, torch.float64)


def test_it_is_the_weighted_square_of_the_error() -> None:
    matrix, rows, columns = torch.randn(5, 8).double(), torch.rand(5).double(), torch.rand(8).double()
    found = rounding_losses(Piece(matrix, rows, columns), PACKING, (2, 4))
    for number, bits in enumerate((2, 4)):
        scales = searched(matrix, PACKING.grid(8, bits), columns, PACKING.dtype, SHRINKS[::4])
        error = rounded(matrix, scales).matrix() - matrix
        slow = sum(rows[i] * error[i, j] ** 2 * columns[j] for i in range(5) for j in range(8)) / 2
        assert found[number] == pytest.approx(float(slow))
    assert 0 < found[1] < found[0]
    beyond = rounding_losses(Piece(matrix, rows, columns), PACKING, (4, 6, 8))
    assert beyond.tolist() == pytest.approx([found[1], found[1] / 16, found[1] / 256])
    assert not rounding_losses(Piece(torch.zeros(0, 8), rows[:0], columns), PACKING, (2, 4)).any()


def test_a_sample_of_rows_stands_for_all() -> None:
    generator = torch.Generator().manual_seed(1)
    matrix = torch.randn(600, 16, dtype=torch.float64, generator=generator)
    rows, columns = torch.ones(600).double(), torch.ones(16).double()
    (found,) = rounding_losses(Piece(matrix, rows, columns), PACKING, (3,))
    scales = searched(matrix, PACKING.grid(16, 3), columns, PACKING.dtype, SHRINKS[::4])
    whole = (rounded(matrix, scales).matrix() - matrix).square().sum() / 2
    assert found == pytest.approx(float(whole), rel=0.1)
    assert found != float(whole)


@pytest.mark.parametrize("form", ["pair", "pivot"])
def test_sensitivities_of_factors_are_what_errors_of_single_elements_cost(form: str) -> None:
    """The loss is quadratic in each element of a factor, so that a step of one tells its sensitivity exactly."""
    made, rank = product(), 3
    found = list(pieces(made, Choice(form, (rank,))))
    part = FORMATS[form].encode(made, (rank,))
    outer = "lr_out.weight"
    whole = rebuild(part)
    rows, columns = made.sensitivities
    for piece, name in zip(found, ("inner", outer), strict=True):
        stored = part.inner if name == "inner" else part.others[outer]
        assert torch.allclose(stored.double(), piece.matrix, atol=1e-6)
        for i, j in np.ndindex(*stored.shape):
            step = stored.clone()
            step[i, j] += 1
            others = dict(part.others)
            changed = type(part)(part.format, part.parameters, part.shape, part.inner, others)
            if name == "inner":
                changed = type(part)(part.format, part.parameters, part.shape, step, others)
            else:
                others[outer] = step
            error = rebuild(changed) - whole
            cost = float(rows @ error.square() @ columns)
            assert float(piece.rows[i] * piece.columns[j]) == pytest.approx(cost, rel=1e-5)
