"""Grids of a few bits: rounding to the nearest point, and the scales that lose least by it.

A row's columns are cut into groups of equally many; a group's weights are s (c − z) with a scale s, whole numbers c of
b bits, −2ᵇ⁻¹ ≤ c < 2ᵇ⁻¹, and a zero point z, which is 0 on a symmetric grid. A scale may be negative: a symmetric grid
has one point more below zero than above.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# How far a grid may be narrower than the weights of a group: some are then cut off, and all others rounded less.
SHRINKS = tuple(1 - 0.025 * step for step in range(25))
MOST_BITS = 8
# Weights whose grids are tried at once: they, and what is computed of them, stay in the cache of a core.
AT_ONCE = 1 << 16


@dataclass(frozen=True)
class Grid:
    """What the points of a quantized matrix may be.

    Attributes
    ----------
    bits
        Of a weight, 2 to 8.
    group
        How many columns of a row share a scale; the matrix has a multiple of it.
    symmetric
        Whether zero points are 0, and not stored.
    """

    bits: int
    group: int
    symmetric: bool = True

    @property
    def low(self) -> int:
        """The least code."""
        return -(1 << (self.bits - 1))

    @property
    def high(self) -> int:
        """The largest code."""
        return (1 << (self.bits - 1)) - 1


@dataclass(frozen=True, eq=False)
class Scales:
    """The scales of a matrix (m, n).

    Attributes
    ----------
    grid
        What is scaled.
    scale
        s, (m, n / group) float64, with values that the dtype in which it will be stored has.
    zero
        z, (m, n / group) float64, whole numbers.
    """

    grid: Grid
    scale: Tensor
    zero: Tensor

    def columns(self) -> tuple[Tensor, Tensor]:
        """Return s and z of every weight, (m, n)."""
        group = self.grid.group
        return self.scale.repeat_interleave(group, 1), self.zero.repeat_interleave(group, 1)


@dataclass(frozen=True, eq=False)
class Quantized:
    """A quantized matrix (m, n).

    Attributes
    ----------
    scales
        Its scales.
    codes
        c, (m, n), whole numbers: float64 as they are found, int8 as they are kept.
    """

    scales: Scales
    codes: Tensor

    def matrix(self) -> Tensor:
        """Return the weights that it stands for, (m, n) float64."""
        scale, zero = self.scales.columns()
        return (self.codes - zero) * scale


def nearest(weight: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> Tensor:
    """Return the codes of the points that are nearest to weights, all of one shape."""
    return (weight / scale).round_().add_(zero).clamp_(grid.low, grid.high)


def rounded(weight: Tensor, scales: Scales) -> Quantized:
    """Round every weight of a matrix (m, n) to the nearest point of its group."""
    return Quantized(scales, nearest(weight, *scales.columns(), scales.grid))


def spanned(weight: Tensor, grid: Grid, dtype: torch.dtype | None = None) -> Scales:
    """Return scales at which the grid spans all weights (m, n) of each group; `dtype` is as in `searched`."""
    scale, zero = next(_tried(weight.unflatten(1, (-1, grid.group)), grid, (1.0,)))
    return Scales(grid, _storable(scale, dtype), zero)


def searched(
    weight: Tensor,
    grid: Grid,
    importance: Tensor | None = None,
    dtype: torch.dtype | None = None,
    shrinks: Sequence[float] = SHRINKS,
) -> Scales:
    """Find scales by trial: those at which rounding to the nearest point loses least, group by group.

    The loss of a group is Σ_j h_j (w_j − q_j)², with h the diagonal of a Gram matrix or 1. Tried are grids that span
    all the group's weights, or less, in steps (`SHRINKS`); a symmetric one with its odd point on either side.

    Parameters
    ----------
    weight
        W, (m, n) float64.
    grid
        What to round to.
    importance
        h, (n,).
    dtype
        In which scales will be stored: only its values are tried. None for any.
    shrinks
        How far grids are narrower.

    Raises
    ------
    ValueError
        The group does not divide the columns.
    """
    n = weight.shape[1]
    if n % grid.group:
        raise ValueError(f"{n} columns cannot be cut into groups of {grid.group}")
    weigh = weight.new_ones(n) if importance is None else importance.to(weight)
    some = weight.unflatten(1, (-1, grid.group)).split(max(1, AT_ONCE // n))
    found = [_best(rows, grid, weigh.view(-1, grid.group), dtype, shrinks) for rows in some]
    scale, zero = (torch.cat(parts) for parts in zip(*found, strict=True))
    return Scales(grid, scale, zero)


def _best(
    grouped: Tensor, grid: Grid, weigh: Tensor, dtype: torch.dtype | None, shrinks: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Return the scales and zero points that lose least, of groups (m, k, g) whose columns weigh (k, g)."""
    best: Tensor | None = None
    scale = zero = grouped.new_zeros(grouped.shape[:2])
    for tried_scale, tried_zero in _tried(grouped, grid, shrinks):
        stored = _storable(tried_scale, dtype)
        codes = nearest(grouped, stored[..., None], tried_zero[..., None], grid)
        off = codes.sub_(tried_zero[..., None]).mul_(stored[..., None]).sub_(grouped)
        loss = off.square_().mul_(weigh).sum(2)
        if best is None:
            best, scale, zero = loss, stored, tried_zero
            continue
        better = loss < best
        best = torch.where(better, loss, best)
        scale, zero = torch.where(better, stored, scale), torch.where(better, tried_zero, zero)
    return scale, zero


def _tried(grouped: Tensor, grid: Grid, shrinks: Sequence[float]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield scales and zero points to try of groups (m, k, g), the widest first."""
    if grid.symmetric:
        extreme = grouped.gather(2, grouped.abs().argmax(2, keepdim=True))[..., 0]
        for shrink in shrinks:
            for sign in (-1, 1):
                yield shrink * extreme * sign / (-grid.low - (sign > 0) * 0.5), torch.zeros_like(extreme)
        return
    low, high = grouped.amin(2).clamp_max(0), grouped.amax(2).clamp_min(0)
    for below in shrinks[::2]:
        for above in shrinks[::2]:
            scale = (above * high - below * low) / (grid.high - grid.low)
            exact = torch.where(scale > 0, below * low / scale.clamp_min(torch.finfo(scale.dtype).tiny), 0)
            yield scale, (grid.low - exact).round_().clamp_(grid.low, grid.high)


def _storable(scale: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Round scales to a dtype; none becomes zero."""
    tiny = torch.finfo(dtype or scale.dtype).tiny
    away = torch.where(scale.abs() < tiny, torch.full_like(scale, tiny), scale)
    return away if dtype is None else away.to(dtype).to(scale.dtype)


def refitted(found: Quantized, weight: Tensor, gram: Tensor, dtype: torch.dtype | None = None) -> Quantized:
    """Choose the scales anew that are best for the codes, in the whole metric: a least-squares fit of each row.

    With C_r (k, n) the centred codes of a row, cut into its k groups, the scales solve C_r G C_rᵀ s = C_r G w_r. A
    group without any but zeros keeps its scale.

    Parameters
    ----------
    found
        The codes.
    weight, gram
        W, (m, n), and G, (n, n), positive definite.
    dtype
        As `searched`.
    """
    grid = found.scales.grid
    centred = (found.codes - found.scales.columns()[1]).unflatten(1, (-1, grid.group))
    blocks = gram.unflatten(0, (-1, grid.group)).unflatten(2, (-1, grid.group))
    images = torch.einsum("mkg,kglh->mklh", centred, blocks)
    normal = torch.einsum("mklh,mlh->mkl", images, centred)
    target = torch.einsum("mklh,mlh->mk", images, weight.unflatten(1, (-1, grid.group)))
    empty = centred.square().sum(2) == 0
    normal.diagonal(dim1=1, dim2=2).add_(empty.to(normal) + 1e-12 * normal.diagonal(dim1=1, dim2=2).mean(1, True))
    solved = torch.linalg.solve(normal, target[..., None])[..., 0]
    scale = torch.where(empty | (solved == 0), found.scales.scale, _storable(solved, dtype))
    return replace(found, scales=replace(found.scales, scale=scale))
