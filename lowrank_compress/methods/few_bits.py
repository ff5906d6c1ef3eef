"""What a group loses by being stored in few bits, dense or compressed: predicted, before anything is rounded.

Rounding makes errors that depend little on each other, so that the diagonals of a metric tell what they cost:
½ Σ_ij f_i e_ij² g_j of an error E of a matrix whose rows have the sensitivities f and columns g. Of factors A B of a
matrix, (Aᵀ diag(f) A)_kk is what row k of B has for f, (B diag(g) Bᵀ)_kk what column k of A has for g. Errors are
those of rounding to the nearest point of a grid with searched scales, on a sample of rows; better ways to round lose
less, and by much the same share everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import singledispatch

import numpy as np
import torch
from torch import Tensor

from lowrank_compress.allocation.choice import DENSE, Choice
from lowrank_compress.errors import UnsupportedError
from lowrank_compress.formats.packed import Packing
from lowrank_compress.formats.spec import Product
from lowrank_compress.linalg.quantize import SHRINKS, rounded, searched
from lowrank_compress.methods.edit import Source
from lowrank_compress.methods.groups import TargetGroup
from lowrank_compress.methods.matrix_group import MatrixGroup
from lowrank_compress.methods.module_group import ModuleGroup
from lowrank_compress.shipped.formats.base import INDEX_DTYPE

SAMPLED, RANKS, ROUNDED = 64, 4, 4
FORMATS = ("pair", "pivot")


@dataclass(frozen=True, eq=False)
class Ways:
    """How a group may be stored in few bits.

    Attributes
    ----------
    choices
        What it may be: dense, and all else.
    loss
        (choices,) float64: half the squared loss of each, without rounding.
    rounding
        (choices, bits) float64: what rounding adds to that.
    stored
        (choices, bits) int64: bytes.
    """

    choices: tuple[Choice, ...]
    loss: np.ndarray
    rounding: np.ndarray
    stored: np.ndarray


@dataclass(frozen=True, eq=False)
class Piece:
    """A matrix (m, n) that is rounded by itself, with what errors of its rows (m,) and columns (n,) cost."""

    matrix: Tensor
    rows: Tensor
    columns: Tensor


def rounding_losses(piece: Piece, packing: Packing, bits: Sequence[int]) -> np.ndarray:
    """Predict what rounding a matrix to each of some numbers of bits costs: (bits,) float64.

    The share of its energy that rounding `SAMPLED` of its rows loses, evenly spaced, is taken for that of all. Of more
    than `ROUNDED` bits a bit more quarters the square of an error.
    """
    matrix, rows, columns = (part.double() for part in (piece.matrix, piece.rows, piece.columns))
    if not matrix.numel():
        return np.zeros(len(bits))
    energy = rows @ (matrix.square() @ columns)
    picked = torch.linspace(0, len(matrix) - 1, min(SAMPLED, len(matrix))).round().long().to(matrix.device)
    sample, weigh = matrix[picked], rows[picked]
    own = weigh @ (sample.square() @ columns)
    found, last = list[Tensor](), 0
    for each in bits:
        if each > ROUNDED and found:
            found.append(found[-1] / 4.0 ** (each - last))
        else:
            scales = searched(sample, packing.grid(matrix.shape[1], each), columns, packing.dtype, SHRINKS[::4])
            error = rounded(sample, scales).matrix() - sample
            found.append(weigh @ (error.square() @ columns))
        last = each
    return (torch.stack(found) * (energy / own if own > 0 else 0.0) / 2).cpu().numpy()


def ways_of(
    group: TargetGroup, source: Source, basis: Mapping[str, Tensor], packing: Packing, bits: Sequence[int]
) -> Ways:
    """List how a group may be stored.

    Parameters
    ----------
    source, basis
        Its weights, and the basis of all groups of its block.
    packing, bits
        What is stored, and how few bits of a weight there may be.

    Raises
    ------
    UnsupportedError
        It is a group of which this is not known.
    """
    return _ways(group, source, basis, packing, bits)


@singledispatch
def _ways(
    group: TargetGroup, source: Source, basis: Mapping[str, Tensor], packing: Packing, bits: Sequence[int]
) -> Ways:
    raise UnsupportedError(
        f"{group.name} cannot be planned in bytes, as what rounding costs it is not known. Leave it dense, or pass "
        "--ratio in place of --bytes and then `lrc quantize`."
    )


@_ways.register
def _of_matrix(
    group: MatrixGroup, source: Source, basis: Mapping[str, Tensor], packing: Packing, bits: Sequence[int]
) -> Ways:
    whole = _dense(group.name, source.weight(group.target), basis, packing, bits)
    parts = [([DENSE], np.zeros(1), whole[None], _sizes(group, [DENSE], packing, bits))]
    for format in FORMATS:
        choices = group.choices(format, source.multiple)
        lost = group.losses(basis, choices) / 2
        chosen = [choices[number] for number in range(len(lost))]
        # Scales of a row's groups want whole ones, where there is more than one.
        fitting = np.array([c.parameters[0] <= packing.group or c.parameters[0] % packing.group == 0 for c in chosen])
        chosen, lost = [c for c, fits in zip(chosen, fitting, strict=True) if fits], lost[fitting]
        if chosen:
            product = group.product(source, basis).up_to(chosen[-1].parameters[0])
            added = _rounded_factors(chosen, product, packing, bits)
            parts.append((chosen, lost, added, _sizes(group, chosen, packing, bits)))
    return _joined(parts)


@_ways.register
def _of_module(
    group: ModuleGroup, source: Source, basis: Mapping[str, Tensor], packing: Packing, bits: Sequence[int]
) -> Ways:
    """What is kept of a width loses that share by rounding; sensitivities are those of its matrices by themselves."""
    (width,) = group.shape
    found = [_dense(target.name, source.weight(target), basis, packing, bits) for target in group.targets]
    choices = group.choices(group.formats[0], source.multiple)
    chosen = [DENSE, *(choices[number] for number in range(len(choices)))]
    lost = np.append(0.0, group.losses(basis, choices) / 2)
    shares = np.array([1.0 if choice.is_dense else choice.parameters[0] / width for choice in chosen])
    return Ways(tuple(chosen), lost, shares[:, None] * np.sum(found, 0), _sizes(group, chosen, packing, bits))


def _dense(name: str, weight: Tensor, basis: Mapping[str, Tensor], packing: Packing, bits: Sequence[int]) -> np.ndarray:
    """What rounding a dense matrix costs, (bits,)."""
    if f"{name}/out_sensitivity" not in basis:
        raise UnsupportedError(
            f"{name} has no linear method among its candidates, so that what rounding costs it is not known. With "
            "--bytes, take --method auto, or kfac."
        )
    rows, columns = (basis[f"{name}/{side}_sensitivity"] for side in ("out", "in"))
    return rounding_losses(Piece(weight.cpu(), rows, columns), packing, bits)


def bytes_of(group: TargetGroup, choice: Choice, packing: Packing, bits: int) -> int:
    """Count what a choice stores in so many bits a weight."""
    index = 0 if choice.is_dense else group.price(choice).indices * INDEX_DTYPE.itemsize
    return index + sum(packing.bytes(shape, bits) for shape in _shapes(group, choice) if all(shape))


def _sizes(group: TargetGroup, choices: Sequence[Choice], packing: Packing, bits: Sequence[int]) -> np.ndarray:
    return np.array([[bytes_of(group, choice, packing, each) for each in bits] for choice in choices], dtype=np.int64)


def _shapes(group: TargetGroup, choice: Choice) -> list[tuple[int, int]]:
    """Shapes of the matrices that are stored in the place of a group's."""
    if choice.is_dense:
        return [target.shape for target in group.targets]
    (kept,) = choice.parameters
    if choice.format in FORMATS:
        ((rows, columns),) = (target.shape for target in group.targets)
        return [(kept, columns), (rows if choice.format == "pair" else rows - kept, kept)]
    (width,) = group.shape
    return [
        (rows, columns * kept // width) if target.role in ("o", "down") else (rows * kept // width, columns)
        for target in group.targets
        for rows, columns in [target.shape]
    ]


def pieces(product: Product, choice: Choice) -> Iterator[Piece]:
    """What a format rounds of a matrix."""
    rows, columns = (side.double() for side in product.sensitivities)
    (rank,) = choice.parameters
    if choice.format == "pair":
        left, right = (factor.double() for factor in product.factors(rank))
        yield Piece(right, rows @ left.square(), columns)
        yield Piece(left, rows, right.square() @ columns)
        return
    index, pivots, coefficients = product.interpolated(rank)
    pivots, coefficients = pivots.double(), coefficients.double()
    others = torch.ones(len(rows), dtype=torch.bool).index_fill_(0, index.long(), False)
    yield Piece(pivots, rows[index.long()] + rows[others] @ coefficients.square(), columns)
    yield Piece(coefficients, rows[others], pivots.square() @ columns)


def _rounded_factors(choices: Sequence[Choice], product: Product, packing: Packing, bits: Sequence[int]) -> np.ndarray:
    """What rounding adds to choices of one format, by rising rank: computed of some, in between by straight lines."""
    ranks = np.array([choice.parameters[0] for choice in choices])
    some = np.unique(np.linspace(0, len(choices) - 1, RANKS).round().astype(int))
    found = np.array(
        [
            np.sum([rounding_losses(piece, packing, bits) for piece in pieces(product, choices[number])], 0)
            for number in some
        ]
    )
    return np.stack([np.interp(ranks, ranks[some], column) for column in found.T], 1)


def _joined(parts: Sequence[tuple[Sequence[Choice], np.ndarray, np.ndarray, np.ndarray]]) -> Ways:
    choices, *arrays = zip(*parts, strict=True)
    return Ways(tuple(choice for each in choices for choice in each), *map(np.concatenate, arrays))
