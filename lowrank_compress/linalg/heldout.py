"""The loss of a fit on a sample that it was not made on, at every rank at once.

A loss taken on the sample that a fit was made on is no prediction: with few tokens it is near zero where the truth is a
ruin. What drops the components r, r + 1, … of some basis changes the output by Σ_{i≥r} e_i c_i(x), so that under the
moments of another sample the squared loss is Σ_{i,j≥r} X_ij Z_ij, with X the near metric between the e_i and Z the
moments between the c_i: sums over the lower right corners of one elementwise product.

Those moments are mixed with a share of isotropic ones: the test text is not quite like the calibration text, and what
has no weight in a small sample has some in the next.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank_compress.linalg.weighted import Projector

ISOTROPIC = 0.1


def corner_sums(product: Tensor) -> Tensor:
    """Return Σ_{i,j≥r} product_ij for r = 0 … k, (k + 1,), of (k, k)."""
    # Row i counts from where it meets the corner: what entering r adds is row and column r beyond r.
    upper = product.triu()
    lower = product.tril(-1)
    added = upper.sum(1) + lower.sum(0)
    return torch.cat([added, added.new_zeros(1)]).flip(0).cumsum(0).flip(0)


def mixed(moment: Tensor, isotropic: Tensor | None = None, scale: float | None = None) -> Tensor:
    """Mix a moment, (k, k), with the share ISOTROPIC of `scale` times an isotropic one (the identity by default).

    `scale` is the mean of the diagonal where it is not given.
    """
    scale = moment.diagonal().mean().item() if scale is None else scale
    if isotropic is None:
        result = (1 - ISOTROPIC) * moment
        result.diagonal().add_(ISOTROPIC * scale)
        return result
    return torch.add((1 - ISOTROPIC) * moment, isotropic, alpha=ISOTROPIC * scale)


def projector_losses(projector: Projector, near: Tensor, far: Tensor) -> Tensor:
    """Squared loss of a complete projector at rank 0 … k under other moments, (k + 1,) float64.

    Parameters
    ----------
    projector
        With all k components.
    near
        The near metric F, (k, k).
    far
        The far product P, (k, k).
    """
    expand, contract = projector.expand, projector.contract
    return corner_sums((expand.mT @ near @ expand) * (contract @ far @ contract.mT))


def regression_losses(images: Tensor, root: Tensor, gram: Tensor) -> Tensor:
    """Squared loss of a regression on the first k of n ordered units, k = 0 … n, under another Gram matrix.

    With the fit's C = R Rᵀ and D_k, which zeroes the first k entries, what regression on k units leaves of the units h
    is R D_k R⁻¹ h; so the loss is Σ_{i,j≥k} (Rᵀ A Aᵀ R)_ij (R⁻¹ G R⁻ᵀ)_ij.

    Parameters
    ----------
    images
        A = (L W)ᵀ, (n, m): what the units become in the metric of the loss.
    root
        R, (n, n), lower triangular.
    gram
        G, (n, n), of the other sample, in the same order.
    """
    left = root.mT @ images
    half = torch.linalg.solve_triangular(root, gram, upper=False)
    return corner_sums((left @ left.mT) * torch.linalg.solve_triangular(root, half.mT, upper=False))


def falling(losses: Tensor) -> Tensor:
    """Return the least loss at this or a smaller rank: never rising, never negative, as curves must be."""
    return losses.clamp_min(0).cummin(0).values


def score(losses: Tensor) -> float:
    """Return the mean logarithm of losses over the logarithms of ranks: the smaller, the better the fit.

    So every ratio counts: where much is removed ranks are small, and there are few of them.
    """
    inner = falling(losses)[1:-1] if len(losses) > 2 else losses[:1]
    weights = torch.arange(1, len(inner) + 1, dtype=inner.dtype, device=inner.device).reciprocal()
    least = max(torch.finfo(inner.dtype).tiny, 1e-12 * float(losses[0]))
    return ((inner.clamp_min(least).log() * weights).sum() / weights.sum()).item()
