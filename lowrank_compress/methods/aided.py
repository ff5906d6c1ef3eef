"""Rounding of a matrix that is helped: by scales that shift outliers to weights, a product, or precise columns.

SVDQuant (Li et al., arXiv 2411.05007) divides the inputs of a layer by scales λ, multiplies its weights by them, and
has a product of low rank in full precision, so that less is left to round in either. LLM.int8() (Dettmers et al.,
NeurIPS 2022) leaves those columns of the weight alone that large inputs meet.

With Ŵ = W diag(λ) and Ĝ = diag(λ)⁻¹ G diag(λ)⁻¹ any rounding does for Ŵ what it does for W; for columns that are left
alone it is asked to round zeros, which nothing in Ĝ ties to other columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowrank_compress.linalg.quantease import loss
from lowrank_compress.linalg.quantize import Grid, Quantized, rounded, spanned
from lowrank_compress.linalg.residual import residual
from lowrank_compress.linalg.sweep import damped
from lowrank_compress.methods.rounding import ROUNDS, Problem, Rounding
from lowrank_compress.shipped.beside import Beside, rounded_activations

STRENGTHS = tuple(step / 10 for step in range(11))
"""α in λ = (largest input)^α / (largest weight)^(1 − α), column by column (SmoothQuant, arXiv 2211.10438)."""


@dataclass(frozen=True, eq=False)
class Aid:
    """How a matrix is to be helped, and what is known for it of its inputs.

    Attributes
    ----------
    rank
        Of the product; 0 for none.
    threshold
        Columns are left alone whose inputs are larger somewhere; None to leave none alone.
    smooth
        Whether outliers are shifted to the weights.
    activation_bits
        To which inputs are rounded; 0: not.
    peaks
        The largest magnitude of each input, (n,) float64.
    rows
        Some inputs, (k, n) float64.
    """

    rank: int
    threshold: float | None
    smooth: bool
    activation_bits: int
    peaks: Tensor
    rows: Tensor


@dataclass(frozen=True, eq=False)
class Aided:
    """A matrix W ≈ Q diag(λ)⁻¹ + A B, with columns of its own.

    Attributes
    ----------
    quantized
        Q; points of the columns that are left alone are zeros.
    scales
        λ, (n,).
    columns, kept
        Those left alone, (k,) int64, and what they hold, (m, k).
    outer, inner
        A, (m, r), and B, (r, n); r is 0 where there is no product.
    lost
        As `Problem.lost`, and what is lost by rounded inputs, where they are.
    """

    quantized: Quantized
    scales: Tensor
    columns: Tensor
    kept: Tensor
    outer: Tensor
    inner: Tensor
    lost: float

    def tensors(self, beside: Beside) -> dict[str, Tensor]:
        """Name what is stored beside the codes, as the layer does."""
        found = {"weight_outer": self.outer, "weight_inner": self.inner, "weight_smooth": self.scales}
        found |= {"weight_outliers": self.kept, "weight_columns": self.columns.int()}
        rows, columns = self.quantized.codes.shape
        return {name: found[name] for name in beside.buffers(rows, columns, None)}


def aided(problem: Problem, grid: Grid, rounding: Rounding, aid: Aid) -> Aided:
    """Round a matrix with help.

    The strength α of the shift, or none, and where the product begins, as the best for all of Ŵ (SVDQuant) or at none
    (LQ-LoRA), are what lose least with rounding to the nearest point; the matrix is then rounded as asked for.

    Parameters
    ----------
    problem
        The matrix; its G is known.
    grid, rounding
        To what, and how.
    aid
        With what help.
    """
    parts = _Parts(problem, grid, aid)
    ways = [(scales, start) for scales in parts.shifts() for start in ((False, True) if aid.rank else (False,))]
    if len(ways) > 1:
        ways.sort(key=lambda way: parts.fit(way[0], way[1], _QUICK, rounds=1).lost)
    return parts.fit(ways[0][0], ways[0][1], rounding)


def _spanning(problem: Problem, grid: Grid) -> Quantized:
    return rounded(problem.weight, spanned(problem.weight, grid, problem.dtype))


_QUICK = Rounding("quick", "to the nearest point of a grid that spans all", "nothing", _spanning)


class _Parts:
    """What all trials of a matrix have in common."""

    def __init__(self, problem: Problem, grid: Grid, aid: Aid) -> None:
        self.problem, self.grid, self.aid = problem, grid, aid
        alone = aid.peaks > (float("inf") if aid.threshold is None else aid.threshold)
        self.alone = alone
        self.columns = alone.nonzero().flatten()
        self.kept = self._stored(problem.weight[:, alone])

    def _stored(self, values: Tensor) -> Tensor:
        return values.to(self.problem.dtype).double()

    def shifts(self) -> Iterator[Tensor]:
        """Yield scales to try, with values that stored ones can have; ones first, and alone if none are asked for."""
        weights = self.problem.weight.abs().amax(0)
        yield torch.ones_like(weights)
        used = (self.aid.peaks > 0) & (weights > 0) & ~self.alone
        for strength in STRENGTHS if self.aid.smooth and bool(used.any()) else ():
            scales = torch.ones_like(weights)
            scales[used] = self.aid.peaks[used] ** strength / weights[used] ** (1 - strength)
            scales[used] /= scales[used].log().mean().exp()
            yield self._stored(scales.clamp(1e-4, 1e4))

    def fit(self, scales: Tensor, product_first: bool, rounding: Rounding, rounds: int = ROUNDS) -> Aided:
        """Round with given scales; the best of some rounds, in which Q and the product are fitted in turn."""
        assert self.problem.gram is not None
        gram = self.problem.gram / scales / scales[:, None]
        gram[self.alone] = gram[:, self.alone] = 0
        gram.diagonal()[self.alone] = gram.diagonal().sum() / max(int((~self.alone).sum()), 1)
        weight = (self.problem.weight * scales).masked_fill(self.alone, 0)
        moved, rank = replace(self.problem, weight=weight, gram=gram), self.aid.rank
        outer, inner = weight.new_zeros(len(weight), rank), weight.new_zeros(rank, weight.shape[1])
        if not rank:
            return self._made(rounding.fit(moved, self.grid), scales, outer, inner)
        metric = moved.inputs()
        fisher = None if moved.fisher is None else damped(moved.fisher, moved.damping_fisher)
        if product_first:
            outer, inner = residual(weight, torch.eye(weight.shape[1]).to(weight), None, rank)
        found = list[Aided]()
        for _ in range(rounds):
            quantized = rounding.fit(replace(moved, weight=weight - outer @ inner), self.grid)
            found.append(self._made(quantized, scales, outer, inner))
            outer, inner = residual(weight - quantized.matrix(), metric, fisher, rank)
            found.append(self._made(quantized, scales, outer, inner))
        return min(found, key=lambda each: each.lost)

    def _made(self, quantized: Quantized, scales: Tensor, outer: Tensor, inner: Tensor) -> Aided:
        zero = quantized.scales.columns()[1]
        quantized = replace(quantized, codes=torch.where(self.alone, zero, quantized.codes))
        outer, inner = self._stored(outer), self._stored((inner / scales).masked_fill(self.alone, 0))
        made = Aided(quantized, scales, self.columns, self.kept, outer, inner, 0.0)
        return replace(made, lost=self._lost(made))

    def _lost(self, made: Aided) -> float:
        """What is lost by the weights, and by rounded inputs, as if neither knew of the other."""
        problem, bits = self.problem, self.aid.activation_bits
        codes = made.quantized.matrix()
        beside = codes / made.scales - codes + made.outer @ made.inner
        beside = beside.index_add(1, made.columns, made.kept)
        lost = problem.lost(made.quantized, beside)
        if not bits:
            return lost
        met = (self.aid.rows / made.scales).masked_fill(self.alone, 0)
        off = (met - rounded_activations(met, bits, self.grid.group)) @ codes.mT
        if problem.fisher is not None:
            return lost + float(((off @ problem.fisher) * off).sum(1).mean()) / 2
        assert problem.gram is not None
        whole = max(loss(problem.weight, problem.gram), torch.finfo(torch.float64).tiny)
        return lost + float(off.square().sum(1).mean()) / whole
