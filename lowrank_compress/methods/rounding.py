"""Ways to round a matrix to a grid of a few bits: a table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from lowrank_compress.linalg.quantease import descended, loss
from lowrank_compress.linalg.quantize import Grid, Quantized, rounded, searched
from lowrank_compress.linalg.residual import residual
from lowrank_compress.linalg.sweep import damped, swept
from lowrank_compress.linalg.twosided import swept_both
from lowrank_compress.registry import Registry

Needs = Literal["nothing", "inputs", "gradients"]
PASSES, ROUNDS = 3, 4


@dataclass(frozen=True, eq=False)
class Problem:
    """A matrix that is to be rounded.

    Attributes
    ----------
    weight
        W, (m, n) float64.
    dtype
        In which its scales will be stored.
    damping, damping_fisher
        Shares of the mean diagonals that are added to the diagonals of G and F.
    gram, fisher
        G = E[x xᵀ], (n, n), and F = E[g gᵀ], (m, m), float64, where they are known.
    """

    weight: Tensor
    dtype: torch.dtype
    damping: float
    damping_fisher: float
    gram: Tensor | None = None
    fisher: Tensor | None = None

    def inputs(self) -> Tensor:
        """G, damped."""
        assert self.gram is not None
        return damped(self.gram, self.damping)

    def lost(self, found: Quantized, product: Tensor | None = None) -> float:
        """What is lost, by the matrix that was found and perhaps one that is added to it.

        In nats a token where F is known (½ tr F E G Eᵀ); else the share of tr W G Wᵀ, with I for a G that is unknown.
        """
        error, gram = self.weight - found.matrix(), self.gram
        error = error if product is None else error - product
        gram = torch.eye(error.shape[1]).to(error) if gram is None else gram
        if self.fisher is not None:
            return loss(error, gram, self.fisher) / 2
        return loss(error, gram) / max(loss(self.weight, gram), torch.finfo(torch.float64).tiny)


def _nearest(problem: Problem, grid: Grid) -> Quantized:
    return rounded(problem.weight, searched(problem.weight, grid, None, problem.dtype))


def _swept(problem: Problem, grid: Grid) -> Quantized:
    gram = problem.inputs()
    return swept(problem.weight, searched(problem.weight, grid, gram.diagonal(), problem.dtype), gram)


def _descended(problem: Problem, grid: Grid) -> Quantized:
    assert problem.gram is not None
    return descended(_swept(problem, grid), problem.weight, problem.gram, PASSES)


def _both(problem: Problem, grid: Grid) -> Quantized:
    """The two-sided sweep; or the descent in G alone, where that loses less: what is cut off is made up for badly."""
    assert problem.fisher is not None
    start = _descended(problem, grid)
    fisher = damped(problem.fisher, problem.damping_fisher)
    return min((swept_both(problem.weight, start.scales, problem.inputs(), fisher), start), key=problem.lost)


@dataclass(frozen=True, eq=False)
class WithResidual:
    """A matrix as Q + A B.

    Attributes
    ----------
    quantized
        Q.
    outer, inner
        A, (m, r), and B, (r, n), float64, with values that the dtype has in which they will be stored.
    lost
        As `Problem.lost`, of both together.
    """

    quantized: Quantized
    outer: Tensor
    inner: Tensor
    lost: float


def with_residual(problem: Problem, grid: Grid, rounding: Rounding, rank: int, dtype: torch.dtype) -> WithResidual:
    """Fit in turn Q to W − A B and A B to W − Q (LQ-LoRA, ICLR 2024), and return the best of `ROUNDS`.

    Parameters
    ----------
    rank, dtype
        Of A and B.
    """
    weight, found = problem.weight, list[WithResidual]()
    gram = torch.eye(weight.shape[1]).to(weight) if problem.gram is None else problem.inputs()
    fisher = None if problem.fisher is None else damped(problem.fisher, problem.damping_fisher)
    product = torch.zeros_like(weight)
    for _ in range(ROUNDS):
        quantized = rounding.fit(replace(problem, weight=weight - product), grid)
        outer, inner = (part.to(dtype).double() for part in residual(weight - quantized.matrix(), gram, fisher, rank))
        product = outer @ inner
        found.append(WithResidual(quantized, outer, inner, problem.lost(quantized, product)))
    return min(found, key=lambda each: each.lost)


@dataclass(frozen=True)
class Rounding:
    """A way to round a matrix.

    Attributes
    ----------
    name, help
        What users call it, and one line.
    needs
        What it has to know of the model on text.
    fit
        Rounds.
    """

    name: str
    help: str
    needs: Needs
    fit: Callable[[Problem, Grid], Quantized]


_OWN = (
    Rounding("rtn", "to the nearest point, with searched scales; needs no data", "nothing", _nearest),
    Rounding("gptq", "column by column, later ones make up for earlier ones (GPTQ)", "inputs", _swept),
    Rounding("quantease", "that, and coordinate descent on top (QuantEase)", "inputs", _descended),
    Rounding("kfac", "rows and columns make up for each other, in the metric of the loss", "gradients", _both),
)
ROUNDINGS: Registry[Rounding] = Registry(
    "rounding", "lowrank_compress.roundings", {each.name: each for each in _OWN}, Rounding
)
