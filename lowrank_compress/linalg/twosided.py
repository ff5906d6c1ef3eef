"""Quantization in a metric on both sides: what is rounded later makes up for what was, in its row and in its column.

Minimised is tr F E G Eᵀ of the error E = W − Q, to second order twice the loss increase where G = E[x xᵀ] and
F = E[g gᵀ]. With G = U D Uᵀ and F = V D' Vᵀ, U and V upper triangular with ones on the diagonal, it is
Σ d'_i d_j (Vᵀ E U)²_ij, and (Vᵀ E U)_ij is e_ij plus what rows up to i and columns up to j have left behind. So each
weight is rounded to the point that is nearest to w_ij plus that: nearest-plane rounding in the metric F ⊗ G (as YAQA,
arXiv 2505.22988, rounds with two-sided feedback). With F = I it is the sweep over columns.

Weights whose row and column add up to the same do not see each other. They are rounded at once, in tiles along such a
diagonal; what tiles see of others are matrix products.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_compress.errors import NumericsError
from lowrank_compress.linalg.quantize import Grid, Quantized, Scales, nearest

TILE = 32


def unit_upper(metric: Tensor) -> Tensor:
    """Return the upper triangular U with ones on its diagonal and metric = U D Uᵀ, D diagonal.

    Raises
    ------
    NumericsError
        The metric is not positive definite.
    """
    root, problem = torch.linalg.cholesky_ex(metric.flip(0, 1))
    if int(problem):
        raise NumericsError(
            "The metric of a quantized matrix is not positive definite. Raise --damping and --damping-fisher, or use "
            "more calibration text."
        )
    upper = root.flip(0, 1)
    return upper / upper.diagonal()


def swept_both(weight: Tensor, scales: Scales, gram: Tensor, fisher: Tensor) -> Quantized:
    """Quantize a matrix with given scales, rows and columns with the largest metric first.

    Parameters
    ----------
    weight
        W, (m, n) float64.
    scales
        Those of its groups.
    gram, fisher
        G, (n, n), and F, (m, m), float64, positive definite.

    Raises
    ------
    NumericsError
        One of them is not positive definite.
    """
    m, n = weight.shape
    rows, columns = (torch.argsort(each.diagonal(), descending=True, stable=True) for each in (fisher, gram))
    right, left = unit_upper(gram[columns][:, columns]), unit_upper(fisher[rows][:, rows])
    order = rows[:, None], columns[None]
    scale, zero = (part[order] for part in scales.columns())
    grid = _Tiled(m, n, weight)
    plan = _Plan(
        grid.padded(weight[order]),
        grid.padded(scale, 1),
        grid.padded(zero),
        _square(left, grid.rows),
        _square(right, grid.columns),
    )
    codes = torch.empty_like(weight)
    codes[order] = _round_tiles(plan, scales.grid)[:m, :n]
    return Quantized(scales, codes)


@dataclass(frozen=True)
class _Tiled:
    """A matrix (m, n) cut into tiles, the last ones filled up."""

    m: int
    n: int
    like: Tensor

    @property
    def rows(self) -> int:
        return -(-self.m // TILE) * TILE

    @property
    def columns(self) -> int:
        return -(-self.n // TILE) * TILE

    def padded(self, values: Tensor, fill: float = 0) -> Tensor:
        made = self.like.new_full((self.rows, self.columns), fill)
        made[: self.m, : self.n] = values
        return made


@dataclass(frozen=True)
class _Plan:
    """What is to be rounded, in order, all multiples of a tile: weights, scales, zero points, V and U."""

    weight: Tensor
    scale: Tensor
    zero: Tensor
    left: Tensor
    right: Tensor


def _square(triangle: Tensor, size: int) -> Tensor:
    made = torch.eye(size, dtype=triangle.dtype, device=triangle.device)
    made[: len(triangle), : len(triangle)] = triangle
    return made


def _round_tiles(plan: _Plan, grid: Grid) -> Tensor:
    """Round all weights, a diagonal of tiles at once; return the codes."""
    error, folded, codes = (torch.zeros_like(plan.weight) for _ in range(3))  # E, Vᵀ E, c
    high, wide = plan.weight.shape[0] // TILE, plan.weight.shape[1] // TILE
    for diagonal in range(high + wide - 1):
        places = [(i, diagonal - i) for i in range(max(0, diagonal - wide + 1), min(high, diagonal + 1))]
        cuts = [(slice(i * TILE, (i + 1) * TILE), slice(j * TILE, (j + 1) * TILE)) for i, j in places]
        above = torch.stack([plan.left[: r.start, r].mT @ error[: r.start, c] for r, c in cuts])
        before = torch.stack([folded[r, : c.start] @ plan.right[: c.start, c] for r, c in cuts])
        weight, scale, zero = (
            torch.stack([part[cut] for cut in cuts]) for part in (plan.weight, plan.scale, plan.zero)
        )
        left = torch.stack([plan.left[r, r] for r, _ in cuts]).triu(1)
        right = torch.stack([plan.right[c, c] for _, c in cuts]).triu(1)
        made = _round_tile(weight, before, above, scale, zero, left, right, grid)
        for cut, *parts in zip(cuts, *made, strict=True):
            error[cut], folded[cut], codes[cut] = parts
    return codes


def _round_tile(
    weight: Tensor, before: Tensor, above: Tensor, scale: Tensor, zero: Tensor, left: Tensor, right: Tensor, grid: Grid
) -> tuple[Tensor, Tensor, Tensor]:
    """Round tiles (t, b, b) that do not see each other; return E, Vᵀ E and c of each.

    Parameters
    ----------
    before, above
        What tiles to the left and above have left behind.
    left, right
        V and U of the tiles, without their diagonals.
    """
    error, folded, codes = (torch.zeros_like(weight) for _ in range(3))
    target, size = weight + before, weight.shape[1]
    for diagonal in range(2 * size - 1):
        first, last = max(0, diagonal - size + 1), min(size, diagonal + 1)
        i = torch.arange(first, last, device=weight.device)
        j = diagonal - i
        aim = target[:, i, j] + above[:, i, j]
        code = nearest(aim, scale[:, i, j], zero[:, i, j], grid)
        left_over = weight[:, i, j] - (code - zero[:, i, j]) * scale[:, i, j]
        whole = left_over + above[:, i, j]
        codes[:, i, j], error[:, i, j], folded[:, i, j] = code, left_over, whole
        target[:, first:last] += whole[..., None] * right[:, j]
        above[:, :, j] += left[:, i].mT * left_over[:, None]
    return error, folded, codes
