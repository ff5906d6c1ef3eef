"""The matrix that does on what enters it now what another did on what would have entered: a regression in closed form.

Where a model is compressed, a matrix is given other inputs x̂ than the dense model's x. With targets t, what the map is
to emit, the best matrix near an anchor A is

    W* = (E[t x̂ᵀ] + λ s A) (E[x̂ x̂ᵀ] + λ s I)⁻¹, s the mean diagonal of E[x̂ x̂ᵀ];

of its approximations of rank r, Ŵ is the one that loses least of E‖W* x̂ − Ŵ x̂‖² in an output metric L. That is exact
for λ = 0, as the error of W* is orthogonal to all x̂. How far the sample is to be trusted, cross-validation decides: a
fit on each half of it is scored on the other, by tr L (Ŵ E[x̂ x̂ᵀ] Ŵᵀ − 2 Ŵ E[x̂ tᵀ]), which is the error but for a
constant; the matrix that is there already takes part, and stays where no λ is better.

Several maps that read the same inputs and copy a map of the dense model, t = W x, have one solution in common:
W* = W M, with M that for t = x and A = I. Where W has more rows than columns, L itself is never needed: with
K = Wᵀ L W, all of this holds for M in the metric K.

Least squares of a layer's outputs on the inputs that the layers before it leave is how pruned and quantized models are
fitted one layer at a time, too (Hubara and others, AdaPrune, NeurIPS 2021; GPTQ, ICLR 2023).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lowrank_compress.linalg.metric import Full, TriangularRoot
from lowrank_compress.linalg.weighted import Projector, Side, decompose

GRAM_SHRINKAGE = 1e-6
"""Of E[x̂ x̂ᵀ], where it is the metric of a truncation."""


@dataclass(frozen=True, eq=False)
class Sample:
    """Moments of inputs x̂ and of what is regressed on them, summed over tokens; float64, or rounded by `single`.

    Attributes
    ----------
    gram
        Σ x̂ x̂ᵀ, (n, n).
    cross
        Σ t x̂ᵀ, (k, n).
    inputs, targets
        Σ x̂, (n,), and Σ t, (k,).
    count
        Tokens.
    """

    gram: Tensor
    cross: Tensor
    inputs: Tensor
    targets: Tensor
    count: int

    def __add__(self, other: Sample) -> Sample:
        """Put two samples together."""
        return Sample(
            self.gram + other.gram,
            self.cross + other.cross,
            self.inputs + other.inputs,
            self.targets + other.targets,
            self.count + other.count,
        )

    def single(self) -> Sample:
        """Round to single precision."""
        moments = (self.gram, self.cross, self.inputs, self.targets)
        gram, cross, inputs, targets = (moment.float() for moment in moments)
        return Sample(gram, cross, inputs, targets, self.count)

    def of(self, base: Tensor | None) -> Sample:
        """Take the images of the targets under a matrix (m, k) for the targets; None for themselves."""
        if base is None:
            return self
        base = base.to(self.cross)
        return Sample(self.gram, base @ self.cross, self.inputs, base @ self.targets, self.count)

    def centred(self) -> Sample:
        """Take the means out, as a bias would."""
        if self.count == 0:
            return self
        mean = self.inputs / self.count
        return Sample(
            self.gram - torch.outer(self.inputs, mean),
            self.cross - torch.outer(self.targets, mean),
            torch.zeros_like(self.inputs),
            torch.zeros_like(self.targets),
            self.count,
        )

    def offset(self, matrix: Tensor) -> Tensor:
        """Mean of what a matrix (k, n) leaves of the targets, (k,)."""
        return (self.targets - matrix.to(self.inputs) @ self.inputs) / max(self.count, 1)

    @cached_property
    def root(self) -> TriangularRoot:
        """The root of the damped Gram matrix."""
        return Full(self.gram, GRAM_SHRINKAGE).root()


@dataclass(frozen=True, eq=False)
class Solution:
    """W* of a regression, and what it is the solution of: W* D = B with D = (1 − α) E + α s I and α = λ / (1 + λ).

    Attributes
    ----------
    matrix
        W*, (k, n), in the sample's dtype.
    wanted
        B, (k, n).
    shrinkage, pull
        α, and α s.
    """

    matrix: Tensor
    wanted: Tensor
    shrinkage: float
    pull: float

    @cached_property
    def square(self) -> Tensor:
        """W* W*ᵀ, (k, k)."""
        return self.matrix @ self.matrix.mT

    def form(self) -> Tensor:
        """Return W* E W*ᵀ, (k, k), of which B knows all but what damping adds: nothing of size (n, n) is multiplied."""
        return (self.wanted @ self.matrix.mT - self.pull * self.square) / (1 - self.shrinkage)


def solved(sample: Sample, anchor: Tensor | None, strength: float) -> Solution:
    """Regress in the sample's dtype, if that is precise enough; else in float64.

    Parameters
    ----------
    sample
        With its means taken out, if a bias takes them.
    anchor
        A, (k, n); None for I.
    strength
        λ > 0.

    Raises
    ------
    NumericsError
        A moment is not finite.
    """
    shrinkage = strength / (1 + strength)  # the damped matrix over 1 + λ
    lower = _lower(sample.gram, shrinkage)
    pull = shrinkage * (sample.gram.diagonal().mean().item() or 1.0)
    wanted = sample.cross.to(lower.dtype) * (1 - shrinkage)
    if anchor is None:
        wanted.diagonal().add_(pull)
    else:
        wanted += pull * anchor.to(lower.dtype)
    return Solution(torch.cholesky_solve(wanted.mT, lower).mT, wanted, shrinkage, pull)


def solve(sample: Sample, anchor: Tensor | None, strength: float) -> Tensor:
    """Return the W*, (k, n), of `solved`."""
    return solved(sample, anchor, strength).matrix


def _lower(gram: Tensor, shrinkage: float) -> Tensor:
    """Root of a damped Gram matrix."""
    if gram.dtype != torch.float64:
        damped = gram * (1 - shrinkage)
        damped.diagonal().add_(shrinkage * damped.diagonal().mean() / (1 - shrinkage))
        lower, info = torch.linalg.cholesky_ex(damped)
        if int(info) == 0:
            return lower
    return Full(gram, shrinkage).root().lower


@dataclass(frozen=True, eq=False)
class Task:
    """What one matrix is to become.

    Attributes
    ----------
    metric
        L, (k, k), damped; with `left` K.
    rank
        Of the result; None for any.
    side
        The smaller side of the matrix, where it is decomposed.
    base
        W, (k, q), of which the common solution M, (q, n), makes what is looked for; None if M is that itself.
    left
        W, (m, k), by which that has to be multiplied to be the matrix; None if it is.
    affine
        A bias goes along.
    """

    metric: Tensor
    rank: int | None
    side: Side
    base: Tensor | None = None
    left: Tensor | None = None
    affine: bool = False

    @cached_property
    def root(self) -> TriangularRoot:
        """The root of the metric."""
        return Full(self.metric).root()

    def image(self, solution: Tensor) -> Tensor:
        """Make what is looked for, (k, n), of the common solution."""
        return solution if self.base is None else self.base.to(solution) @ solution

    def whole(self, found: Tensor) -> Tensor:
        """Make the matrix, (m, n), of what was looked for."""
        return found if self.left is None else self.left @ found


def project(task: Task, found: Tensor, sample: Sample, known: Solution | None = None) -> Projector | None:
    """Find the best projection of a matrix (k, n) to its task's rank; None where it may have any.

    `known` is the regression that the matrix is the very solution of, where it is one: that saves work.
    """
    if task.rank is None:
        return None
    if task.side == "out":
        scale = sample.gram.diagonal().mean()
        if known is not None and known.matrix is found:
            form = known.form().add_(known.square, alpha=GRAM_SHRINKAGE * scale.item())
        else:
            gram = sample.gram.to(found.dtype, copy=True)
            gram.diagonal().add_(GRAM_SHRINKAGE * scale)
            form = found @ gram @ found.mT
        return decompose(form, _Known(task.root), task.rank)
    return decompose(found.mT @ task.metric.to(found) @ found, _Known(sample.root), task.rank)


@dataclass(frozen=True, eq=False)
class _Known:
    """A metric whose root is known."""

    found: TriangularRoot

    def root(self) -> TriangularRoot:
        return self.found


def truncate(task: Task, found: Tensor, sample: Sample, known: Solution | None = None) -> Tensor:
    """Return the best approximation of a matrix (k, n) at its task's rank; `known` as in `project`."""
    projector = project(task, found, sample, known)
    if projector is None:
        return found
    expand, contract = projector.expand.to(found), projector.contract.to(found)
    return expand @ (contract @ found) if task.side == "out" else (found @ contract.mT) @ expand.mT


def error(task: Task, found: Tensor, bias: Tensor | None, sample: Sample) -> float:
    """Sum over a sample of ‖Ŵ x̂ + b − t‖² in the task's metric, but for what no matrix changes.

    Parameters
    ----------
    found
        Ŵ, (k, n).
    bias
        b, (k,); None for none.
    sample
        With the targets of the task.
    """
    found = found.to(sample.gram)
    value = (task.metric * ((found @ sample.gram - 2 * sample.cross) @ found.mT)).sum()
    if bias is not None:
        bias = bias.to(task.metric)
        image = task.metric @ bias
        left = (found @ sample.inputs - sample.targets).to(image)
        value += 2 * image @ left + sample.count * (image @ bias)
    return value.item()
