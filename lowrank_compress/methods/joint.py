"""Several matrices that read the same, above one another, in one pair of factors: the best in the K-FAC metric.

    min over rank r of ‖F^½ (W − A B) G^½‖_F,  G = E[x xᵀ],  F = blockdiag of E[g gᵀ] of each

on the smaller side of W, as of a single matrix (`linalg.weighted`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from lowrank_compress.calibration.statistics import SMALL
from lowrank_compress.linalg.heldout import falling, mixed, projector_losses, score
from lowrank_compress.linalg.metric import Full
from lowrank_compress.linalg.weighted import Projector, decompose, smaller_side
from lowrank_compress.methods.linear import Damping, shrinkages


def joint(weight: Tensor, gram: Tensor, fisher: Tensor, damping: Damping, keep: int | None = None) -> Projector:
    """Find the best joint factors of W (m, n) in the metric (F, G), on its smaller side.

    Parameters
    ----------
    weight
        W, float64.
    gram, fisher
        G (n, n) and F (m, m), float64, not yet damped.
    keep
        The largest rank wanted; None for all.

    Raises
    ------
    NumericsError
        A moment is not finite, or the near one has no invertible root.
    """
    product, metric, shrinkage = _sides(weight, gram, fisher, damping)
    return decompose(product, Full(metric, shrinkage), keep)


def _sides(weight: Tensor, gram: Tensor, fisher: Tensor, damping: Damping) -> tuple[Tensor, Tensor, float]:
    """Return the far product, and the near metric with its shrinkage."""
    if smaller_side((weight.shape[0], weight.shape[1])) == "out":
        return weight @ _shrunk(gram, damping.gram) @ weight.mT, fisher, damping.fisher
    return weight.mT @ _shrunk(fisher, damping.fisher) @ weight, gram, damping.gram


def _shrunk(moment: Tensor, shrinkage: float) -> Tensor:
    result = (1 - shrinkage) * moment
    result.diagonal().add_(shrinkage * moment.diagonal().mean())
    return result


def fit_joint_held_out(
    weight: Tensor, halves: Sequence[tuple[Tensor, Tensor]], damping: Damping
) -> tuple[Damping, Tensor]:
    """Choose the shrinkage, and predict the loss, by fits that are scored on the other half (see `fit_held_out`)."""

    def losses(choice: Damping) -> Tensor:
        found = []
        for fit, other in ((halves[0], halves[1]), (halves[1], halves[0])):
            plain = replace(damping, fisher=0.0, gram=0.0)
            far, near, _ = _sides(weight, mixed(other[0]), mixed(other[1]), plain)
            found.append(projector_losses(joint(weight, *fit, choice), near, far))
        return (found[0] + found[1]) / 2

    best, least = damping, losses(damping)
    if min(weight.shape) <= SMALL:
        fisher, gram = shrinkages(damping)
        for field, values in (("fisher", fisher[1:]), ("gram", gram[1:])):
            for choice in [replace(best, **{field: value}) for value in values]:
                found = losses(choice)
                if score(found) < score(least):
                    best, least = choice, found
    return best, falling(least)
