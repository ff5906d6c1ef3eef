"""MLPs with fewer hidden units: those that stay make up for those that go (MoDeGPT, ICLR 2025, algorithm 1).

h are the hidden units that enter W_d, the down-projection, and C = E[h hᵀ], damped. Where the units J stay, the best
down-projection is the regression of W_d h on h_J, W_d C_:J C_JJ⁻¹, a Nyström approximation of C. Gate and up lose the
other rows.

Let π order the units, the best first, and C_ππ = R Rᵀ with R lower triangular. Regression on the first k units leaves
the Schur complement R_:,k: R_:,k:ᵀ, so the squared loss ‖L (W_d h − Ŵ_d h_J)‖² is Σ_{i≥k} ‖L W_d,π r_i‖² for every k
at once, and Ŵ_d = W_J + W_rest R₂₁ R₁₁⁻¹ needs nothing but R.

The order is the paper's: by ridge leverage scores diag(C (C + λI)⁻¹), λ the mean of C's diagonal; or, in the Fisher
metric, by elimination with compensation (:func:`~lowrank_compress.linalg.columns.compensated_order`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from lowrank_compress.arch.spec import Role
from lowrank_compress.arch.targets import Heads
from lowrank_compress.calibration.statistics import SMALL
from lowrank_compress.errors import InputError
from lowrank_compress.linalg.columns import compensated_order
from lowrank_compress.linalg.eigen import eigh
from lowrank_compress.linalg.heldout import falling, mixed, regression_losses, score
from lowrank_compress.linalg.metric import Full
from lowrank_compress.linalg.triangle import packed, unpacked
from lowrank_compress.methods.linear import Damping
from lowrank_compress.methods.module import Reduced

# As shrinkage: C/2 + mean(diag C)/2 · I is C + λI with λ the mean diagonal, halved.
RIDGE = 0.5
# What is tried beside the damping asked for.
RIDGES = (1e-3, 1e-2, 1e-1, 0.5)
# Columns of the root that are measured at once.
PANEL = 512


def statistics(fisher: bool) -> Mapping[Role, frozenset[str]]:
    """Return role -> names of its statistics."""
    return {"down": frozenset({"in_gram", "out_fisher"} if fisher else {"in_gram"})}


def decompose(
    heads: Heads | None,
    weights: Mapping[Role, Tensor],
    moments: Mapping[str, Tensor],
    damping: Damping,
    fisher: bool,
) -> dict[str, Tensor]:
    """Order the units, and factor their Gram matrix in that order.

    Returns
    -------
    dict
        ``"order"`` (n,) int64, best first; ``"root"`` R, lower triangular, folded to (⌈n/2⌉, n + 1) float64
        (:func:`~lowrank_compress.linalg.triangle.packed`), which loses nothing that matters in float32; ``"tail"`` (n +
        1,) float64, by number of units.

    Raises
    ------
    NumericsError
        A moment is not finite, or the Gram matrix is indefinite.
    """
    held_out: dict[str, Tensor] = {}
    if fisher and "down/in_gram@first" in moments:
        damping, held_out["held_out"] = _fit_held_out(weights["down"], moments, damping)
    metric = moments["down/out_fisher"] if fisher else None
    images, order, root = _fit(weights["down"], moments["down/in_gram"], metric, damping)
    losses = _losses(images[order], root)
    tail = torch.cat([losses, losses.new_zeros(1)]).flip(0).cumsum(0).flip(0)
    return {"order": order, "root": packed(root), "tail": tail} | held_out


def _fit(down: Tensor, gram: Tensor, fisher: Tensor | None, damping: Damping) -> tuple[Tensor, Tensor, Tensor]:
    """Return (L W_d)ᵀ, the units' order, and the root of their Gram matrix in it."""
    images = _images(down, fisher)
    if fisher is not None:
        order = compensated_order(images, Full(gram, damping.gram).inverse())
    else:
        # A score is 1 − λ [(C + λI)⁻¹]_ii.
        order = Full(gram, RIDGE).inverse().diagonal().argsort(stable=True)
    return images, order, Full(gram[order[:, None], order], damping.gram).root().lower


def _images(down: Tensor, fisher: Tensor | None) -> Tensor:
    """Return (L W_d)ᵀ, (n, m): row i in coordinates in which the loss is a plain sum of squares."""
    images = down.double().mT
    if fisher is None:
        return images
    values, vectors = eigh(fisher)
    return images @ (vectors * values.sqrt())


def _fit_held_out(down: Tensor, moments: Mapping[str, Tensor], damping: Damping) -> tuple[Damping, Tensor]:
    """Choose the damping by fits on one half of the calibration set that are scored on the other, and predict the loss.

    As `linear.fit_held_out`. Where few tokens saw many units the regression interpolates them, and its loss on the same
    tokens is near zero.
    """

    def losses(choice: Damping) -> Tensor:
        found = []
        for fit, other in (("first", "second"), ("second", "first")):
            _, order, root = _fit(down, moments[f"down/in_gram@{fit}"], moments[f"down/out_fisher@{fit}"], choice)
            gram = mixed(moments[f"down/in_gram@{other}"])[order[:, None], order]
            images = _images(down, mixed(moments[f"down/out_fisher@{other}"]))[order]
            found.append(regression_losses(images, root, gram))
        return (found[0] + found[1]) / 2

    best, least = damping, losses(damping)
    for value in RIDGES if len(moments["down/in_gram"]) <= SMALL else ():
        if value > damping.gram and score(found := losses(replace(damping, gram=value))) < score(least):
            best, least = replace(damping, gram=value), found
    return best, falling(least)


def _losses(images: Tensor, root: Tensor) -> Tensor:
    """Return ‖L W r_i‖², (n,), of the columns r_i of the root; images are (L W)ᵀ, (n, m)."""
    # In panels of columns, without what is zero above them.
    panels = (slice(start, start + PANEL) for start in range(0, len(root), PANEL))
    return torch.cat([(root[panel.start :, panel].mT @ images[panel.start :]).square_().sum(1) for panel in panels])


def reduce(
    heads: Heads | None,
    weights: Mapping[Role, Tensor],
    biases: Mapping[Role, Tensor],
    basis: Mapping[str, Tensor],
    width: int,
) -> Reduced:
    """Keep the best units, in the order in which they stood.

    Raises
    ------
    InputError
        The width is not between 0 and the number of units.
    """
    down = weights["down"]
    units = down.shape[1]
    if not 0 <= width <= units:
        raise InputError(f"The width of this MLP must lie between 0 and {units}, got {width}.")
    order, root = basis["order"].to(down.device), unpacked(basis["root"].to(down))
    kept, places = order[:width].sort()
    predicted = torch.linalg.solve_triangular(
        root[:width, :width], down[:, order[width:]] @ root[width:, :width], upper=False, left=False
    )
    return Reduced(
        {
            role: (down[:, order[:width]] + predicted)[:, places] if role == "down" else weight[kept]
            for role, weight in weights.items()
        },
        {role: bias if role == "down" else bias[kept] for role, bias in biases.items()},
    )
