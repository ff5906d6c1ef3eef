"""How `lrc quantize` rounds one matrix: alone, with a product apart from it, or with what is beside its codes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from lowrank_compress.calibration.layers import Seen
from lowrank_compress.linalg.quantize import Grid, Quantized
from lowrank_compress.methods.aided import Aid, aided
from lowrank_compress.methods.rounding import ROUNDINGS, Problem, with_residual
from lowrank_compress.shipped.beside import Beside
from lowrank_compress.stages.quantizeconfig import QuantizeConfig


@dataclass(frozen=True, eq=False)
class Fitted:
    """A rounded matrix.

    Attributes
    ----------
    quantized
        Its codes and scales.
    lost
        As `Problem.lost`.
    beside
        What it has beside its codes.
    more
        The tensors of that by their names; ``outer`` and ``inner`` of a product apart from it.
    """

    quantized: Quantized
    lost: float
    beside: Beside
    more: Mapping[str, Tensor] = field(default_factory=dict)

    def kept(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Name what is kept of it until the checkpoint is written, numbers in a dtype."""
        scales = self.quantized.scales
        found = {"codes": self.quantized.codes.to(torch.int8), "scale": scales.scale.to(dtype)}
        found["zero"] = scales.zero.to(torch.int8)
        return found | {name: each.to(dtype) if each.is_floating_point() else each for name, each in self.more.items()}


class Way(NamedTuple):
    """How a matrix is rounded: to so many bits, with a product of this rank to make up for it."""

    bits: int
    rank: int = 0

    @property
    def key(self) -> str:
        """Its name where it is kept."""
        return f"{self.bits}+{self.rank}" if self.rank else f"{self.bits}"


def beside_of(config: QuantizeConfig, rank: int, outliers: int) -> Beside:
    """Say what a matrix is to have beside its codes: a product of a rank, and so many columns that are left alone."""
    if not config.aided:
        return Beside(rank if config.inside else 0)
    return Beside(rank, outliers, config.smooth, config.activation_bits or 0)


def fit(config: QuantizeConfig, problem: Problem, grid: Grid, rank: int, seen: Seen | None) -> Fitted:
    """Round a matrix.

    Parameters
    ----------
    config
        How.
    problem, grid, rank
        The matrix, to what, and the rank of a product that makes up for it.
    seen
        What is known of single inputs; needed for what is beside codes.
    """
    rounding = ROUNDINGS[config.rounding]
    if config.aided:
        assert seen is not None
        peaks, rows = seen.peaks.to(problem.weight), seen.rows.to(problem.weight)
        aid = Aid(rank, config.outliers, config.smooth, config.activation_bits or 0, peaks, rows)
        made = aided(problem, grid, rounding, aid)
        beside = beside_of(config, rank, len(made.columns))
        return Fitted(made.quantized, made.lost, beside, made.tensors(beside))
    if rank:
        both = with_residual(problem, grid, rounding, rank, problem.dtype)
        names = ("weight_outer", "weight_inner") if config.inside else ("outer", "inner")
        product: dict[str, Tensor] = dict(zip(names, (both.outer, both.inner), strict=True))
        return Fitted(both.quantized, both.lost, beside_of(config, rank, 0), product)
    found = rounding.fit(problem, grid)
    return Fitted(found, problem.lost(found), Beside())
