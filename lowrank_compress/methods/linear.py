"""Linear methods: each minimises ‖L (W − Ŵ) R‖_F over Ŵ of rank r, and is two metrics in a table.

Everything happens on the smaller side of W, (out, in): with out ≤ in the far side is the input, and its metric enters
as the product W R Rᵀ Wᵀ = E[y yᵀ]; with out > in the far side is the output, and Wᵀ LᵀL W = E[δ δᵀ] enters. So no
statistic and no decomposition is larger than min(out, in).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lowrank_compress.arch.targets import Target
from lowrank_compress.calibration.statistics import SMALL, statistic_key
from lowrank_compress.linalg.heldout import falling, mixed, projector_losses, score
from lowrank_compress.linalg.metric import Diagonal, Full, Identity, Metric
from lowrank_compress.linalg.weighted import Projector, decompose, smaller_side
from lowrank_compress.methods.halves import Halves
from lowrank_compress.options import ALPHA, Option

# What is tried beside the shrinkage asked for; 1 leaves nothing of a moment but its mean, and is svd-llm or svd.
SHRINKAGES = (1e-2, 1e-1, 1.0)


@dataclass(frozen=True)
class Side:
    """The metric on one side of the weight, and the statistics it is made of.

    Attributes
    ----------
    near
        Statistics needed where this side is the smaller one (the metric itself).
    far
        Statistics needed where it is the larger one (the metric's product with the weight).
    diagonal
        The metric is a diagonal matrix, made of a vector of statistics.
    absolute
        That vector holds mean absolute values v, and the squared weights are v^(2α).
    fisher
        Shrunk as a Fisher matrix, rather than as a Gram matrix, where it is inverted.
    centred
        The mean input is taken out of the moments where a bias can restore it.
    """

    name: str
    near: tuple[str, ...] = ()
    far: tuple[str, ...] = ()
    diagonal: bool = False
    absolute: bool = False
    fisher: bool = False
    centred: bool = False


# Output side (L)
PLAIN = Side("I")
ROW_FISHER = Side("diag √(row sums of E[(∂ℒ/∂W)²])", ("row_fisher",), ("row_fisher",), diagonal=True, fisher=True)
FISHER = Side("Fisher^½", ("out_fisher",), ("in_fisher", "out_square"), fisher=True)
# Input side (R)
ABSOLUTE = Side("diag (mean abs activation)^α", ("in_abs",), ("in_abs",), diagonal=True, absolute=True)
GRAM = Side("Gram^½", ("in_gram",), ("out_gram", "in_square"))
CENTRED_GRAM = Side("centred Gram^½", ("in_gram", "in_mean"), ("out_gram", "in_mean", "in_square"), centred=True)


@dataclass(frozen=True)
class LinearMethod:
    """A linear method.

    Attributes
    ----------
    left, right
        Metrics of the output and of the input side.
    allocate, storage
        What the method uses where nothing else is asked for.
    unit
        "nats": half the tail estimates the loss increase in nats per token, so the losses of all matrices compare.
        "relative": a tail means something only as a share of the matrix's own total.
    paper
        Source.
    options
        What it can be told: `Damping.options` has their values.
    """

    name: str
    left: Side
    right: Side
    paper: str
    help: str
    allocate: str = "uniform"
    storage: str = "pair"
    unit: str = "relative"
    options: tuple[Option, ...] = ()

    @property
    def metrics(self) -> str:
        """Both metrics, for `lrc list methods`."""
        return f"{self.left.name} · {self.right.name}"

    def sides(self, target: Target) -> tuple[Side, Side]:
        """(near, far): the metric of the smaller side and that of the larger."""
        return (self.left, self.right) if smaller_side(target.shape) == "out" else (self.right, self.left)

    def restores_mean(self, target: Target) -> bool:
        """Whether the mean input is restored through the bias; only where the layer has one, and sees all tokens."""
        return self.right.centred and target.bias is not None and target.expert is None

    def statistics(self, target: Target) -> frozenset[str]:
        """Names of the statistics that a target needs."""
        near, far = self.sides(target)
        names = {*near.near, *far.far}
        return frozenset(names if self.restores_mean(target) else names - {"in_mean"})


@dataclass(frozen=True)
class Damping:
    """How moments become metrics.

    Attributes
    ----------
    fisher, gram
        Relative shrinkage (1−α)M + α·mean(diag M)·I of the Fisher or Gram matrix that is inverted.
    options
        Values of the options that the methods declare, by name.
    """

    fisher: float = 1e-4
    gram: float = 1e-6
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def power(self) -> float:
        """Exponent α of absolute activations."""
        return self.options.get(ALPHA.name, ALPHA.default)


def decompose_target(
    method: LinearMethod,
    target: Target,
    weight: Tensor,
    means: Mapping[str, Tensor],
    damping: Damping,
    keep: int | None = None,
) -> Projector:
    """Decompose one weight in a method's metric.

    Parameters
    ----------
    weight
        W, (out, in), any floating dtype; everything but the products of 16-bit weights (`Identity.form`) is in float64.
    means
        Statistics of the target's block, by `statistic_key`.
    keep
        Largest rank wanted; None for all.

    Raises
    ------
    NumericsError
        A decomposition failed.
    """
    near, far = method.sides(target)
    lookup = _lookup(method, target, weight, means)
    return decompose(_product(far, _wide(target, weight), lookup, damping), _near(near, lookup, damping), keep)


def _lookup(method: LinearMethod, target: Target, weight: Tensor, means: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: means[statistic_key(target, name)].to(weight.device, torch.float64) for name in method.statistics(target)
    }


def _wide(target: Target, weight: Tensor) -> Tensor:
    return weight if smaller_side(target.shape) == "out" else weight.T


def shrinkages(damping: Damping) -> tuple[list[float], list[float]]:
    """Shrinkages of Fisher and Gram matrices to choose from, at least those asked for."""
    return (
        [damping.fisher, *(value for value in SHRINKAGES if value > damping.fisher)],
        [damping.gram, *(value for value in SHRINKAGES if value > damping.gram)],
    )


def fit_held_out(
    method: LinearMethod, target: Target, weight: Tensor, halves: Halves, damping: Damping
) -> tuple[Damping, Tensor]:
    """Choose the damping of a full metric on both sides, and predict its loss, by fits that are scored on other text.

    A fit is made on one half of the calibration set and scored on the other, both ways. Shrinkage is tried side by
    side, of the Fisher matrix first; of large matrices none is tried, which would cost more than it gains.

    Returns
    -------
    tuple
        The damping, and the squared loss at rank 0 … k, (k + 1,) float64, never rising.
    """
    square = _square_of(method, target)
    form = Identity().form(_wide(target, weight))

    def losses(choice: Damping) -> Tensor:
        found = []
        for fit, other in ((halves.first, halves.second), (halves.second, halves.first)):
            projector = decompose_target(method, target, weight, fit, choice)
            near, far = (_lookup(method, target, weight, other)[side] for side in _full_moments(method, target))
            scale = _lookup(method, target, weight, other)[square].mean().item()
            found.append(projector_losses(projector, mixed(near), mixed(far, form, scale)))
        return (found[0] + found[1]) / 2

    best, least = damping, losses(damping)
    if min(target.shape) <= SMALL:
        fisher, gram = shrinkages(damping)
        for field, values in (("fisher", fisher[1:]), ("gram", gram[1:])):
            tried = [replace(best, **{field: value}) for value in values]
            for choice in tried:
                found = losses(choice)
                if score(found) < score(least):
                    best, least = choice, found
    return best, falling(least)


def _full_moments(method: LinearMethod, target: Target) -> tuple[str, str]:
    near, far = method.sides(target)
    return near.near[0], far.far[0]


def _square_of(method: LinearMethod, target: Target) -> str:
    return method.sides(target)[1].far[1]


def _near(side: Side, means: Mapping[str, Tensor], damping: Damping) -> Metric:
    """The metric of the smaller side itself."""
    if not side.near:
        return Identity()
    moment = means[side.near[0]]
    if side.diagonal:
        return Diagonal(_diagonal(side, moment, damping), _shrinkage(side, damping))
    if side.centred and "in_mean" in means:
        moment = moment - torch.outer(means["in_mean"], means["in_mean"])
    return Full(moment, _shrinkage(side, damping))


def _product(side: Side, wide: Tensor, means: Mapping[str, Tensor], damping: Damping) -> Tensor:
    """The metric of the larger side, multiplied from both sides with the weight (small, large)."""
    if not side.far:
        return Identity().form(wide)
    moment = means[side.far[0]]
    if side.diagonal:
        return Diagonal(_diagonal(side, moment, damping)).form(wide)
    square = means["out_square" if side.fisher else "in_square"].mean()
    if side.centred and "in_mean" in means:
        mean = wide.double() @ means["in_mean"]
        moment = moment - torch.outer(mean, mean)
        square = square - means["in_mean"].square().mean()
    # The same shrinkage as of a near metric, of the far one itself: directions that the sample has not are kept in the
    # order of the weight, not in that of rounding.
    shrinkage = _shrinkage(side, damping)
    return torch.add((1 - shrinkage) * moment, Identity().form(wide), alpha=shrinkage * max(square.item(), 0.0))


def _diagonal(side: Side, moment: Tensor, damping: Damping) -> Tensor:
    """Squared weights of a diagonal metric: the moment itself (a Fisher), or |activation|^(2α)."""
    return moment.pow(2 * damping.power) if side.absolute else moment


def _shrinkage(side: Side, damping: Damping) -> float:
    return damping.fisher if side.fisher else damping.gram


def sensitivities(
    method: LinearMethod, target: Target, means: Mapping[str, Tensor], damping: Damping
) -> tuple[Tensor, Tensor]:
    """Diagonals of LᵀL, (out,), and of R Rᵀ, (in,), float64: what an error of single elements costs.

    For an error E with independent elements, such as rounding, ‖L E R‖²_F is Σ_ij out_i E_ij² in_j in expectation, so
    the full metrics need not be kept for it.
    """
    rows, columns = target.shape
    near, far = method.sides(target)
    lookup = {name: means[statistic_key(target, name)].double() for name in method.statistics(target)}
    small = _sensitivity(near, near.near, lookup, min(rows, columns), damping)
    large = _sensitivity(far, far.far, lookup, max(rows, columns), damping)
    return (small, large) if smaller_side(target.shape) == "out" else (large, small)


def _sensitivity(
    side: Side, names: tuple[str, ...], means: Mapping[str, Tensor], size: int, damping: Damping
) -> Tensor:
    if not names:
        return torch.ones(size, dtype=torch.float64)
    if side.diagonal:
        return _diagonal(side, means[names[0]], damping)
    square = next((means[name] for name in names if name in ("in_square", "out_square")), None)
    if square is None:
        square = means[names[0]].diagonal()
    return square - means["in_mean"].square() if side.centred and "in_mean" in means else square
