"""The best low-rank product for what a quantized matrix lacks."""

from __future__ import annotations

import torch
from torch import Tensor


def residual(error: Tensor, gram: Tensor, fisher: Tensor | None, rank: int) -> tuple[Tensor, Tensor]:
    """Minimise tr F (E − A B) G (E − A B)ᵀ over all A (m, r) and B (r, n): the truncated SVD of Lᵀ E R, taken back.

    With F = L Lᵀ and G = R Rᵀ, Lᵀ E R = U Σ Vᵀ gives A = L⁻ᵀ U_r Σ_r^½ and B = Σ_r^½ V_rᵀ R⁻¹; the share of the
    singular values is what LoRA's two factors have, too.

    Parameters
    ----------
    error
        E, (m, n) float64.
    gram, fisher
        G, (n, n), and F, (m, m) or None for the identity: positive definite.
    rank
        r, no more than the smaller side.
    """
    right = torch.linalg.cholesky(gram)
    left = None if fisher is None else torch.linalg.cholesky(fisher)
    weighed = error @ right if left is None else left.mT @ error @ right
    u, sigma, v = torch.linalg.svd(weighed, full_matrices=False)
    # The larger entry of each column is positive, so that the factors repeat.
    signs = torch.sign(u.gather(0, u.abs().argmax(0, keepdim=True)))
    root = sigma[:rank].sqrt()
    outer, inner = (u * signs)[:, :rank] * root, (v * signs.mT)[:rank] * root[:, None]
    if left is not None:
        outer = torch.linalg.solve_triangular(left.mT, outer, upper=True)
    return outer, torch.linalg.solve_triangular(right, inner, upper=False, left=False)
