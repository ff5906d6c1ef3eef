"""The best low-rank approximation of a matrix under an output-side and an input-side metric, on its smaller side.

The problem: min ‖L (W − Ŵ) R‖_F over Ŵ of rank r, W of shape (m, n). With L W R = U Σ Vᵀ the solution is
Ŵ = L⁻¹ U_r Σ_r V_rᵀ R⁻¹ and its squared loss is Σ_{i>r} σ_i² (Eckart-Young in the metrics' coordinates).

Let the *near* side be the smaller one, the output if m ≤ n, and let C Cᵀ be the near metric. If m ≤ n, take L = Cᵀ:
U and Σ² are the eigenpairs of Cᵀ P C with P = W R Rᵀ Wᵀ, so that Ŵ = C⁻ᵀ U_r U_rᵀ Cᵀ W and no root of the far metric
is ever needed. If m > n the same holds for Wᵀ, with P = Wᵀ Lᵀ L W.

Cases: L diagonal and R = I is FWSVD (Hsu et al., ICLR 2022); L = I and R Rᵀ a Gram matrix is SVD-LLM (Wang et al.,
ICLR 2025), which always factors the Gram matrix, the larger of the two wherever m < n.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from lowrank_compress.errors import InputError
from lowrank_compress.linalg.eigen import eigh
from lowrank_compress.linalg.metric import Root

Side = Literal["out", "in"]


@dataclass(frozen=True, eq=False)
class Projector:
    """Nested oblique projections of the near space, P_r = expand[:, :r] @ contract[:r], the best one for each rank r.

    Parameters
    ----------
    values
        (r_max,) float64, descending: σ_i², the squared loss that component i saves.
    total
        Σ σ_i² over all k components: the squared loss at rank 0.
    expand
        (k, r_max); float64 as it is computed.
    contract
        (r_max, k), of the same dtype; contract @ expand = I.
    """

    values: Tensor
    total: float
    expand: Tensor
    contract: Tensor

    def tail(self) -> Tensor:
        """Return the squared loss ‖L (W − Ŵ_r) R‖² at r = 0 … r_max: (r_max + 1,) float64 on the CPU.

        Non-increasing, and exactly 0 at r = k. Where only a part of the components was computed, what they leave of
        the total is the last entry.
        """
        values = self.values.cpu()
        complete = len(values) == len(self.expand)
        rest = 0.0 if complete else max(self.total - values.sum().item(), 0.0)
        # Summed from the small end: accurate, and monotone in floating point too.
        return torch.cat([values, values.new_tensor([rest])]).flip(0).cumsum(0).flip(0)


def smaller_side(shape: tuple[int, int]) -> Side:
    """Return the near side of a matrix of shape (out, in): "out" if out ≤ in, else "in"."""
    return "out" if shape[0] <= shape[1] else "in"


class Rooted(Protocol):
    """What has the root of a metric."""

    def root(self) -> Root:
        """Return it."""
        ...


def decompose(product: Tensor, near: Rooted, keep: int | None = None) -> Projector:
    """Find the best projections of the near space.

    Parameters
    ----------
    product
        P, (k, k), symmetric and of any rank: the far metric's form of W (``far.form(W)`` on the output side,
        ``far.form(W.mT)`` on the input side), or a moment that equals it: E[y yᵀ] of the outputs y = W x on the output
        side, E[δ δᵀ] with δ = Wᵀ ∂ℒ/∂y on the input side. It carries the loss's unit.
    near
        The metric of the near side, of size k, damped by its own shrinkage.
    keep
        The largest rank that will be asked for; None means k.

    Returns
    -------
    Projector
        With r_max = min(keep, k) components, on the device of P.

    Raises
    ------
    NumericsError
        If P is not finite, or the near metric has no invertible root.
    """
    root = near.root()
    matrix = root.congruence(product.double())
    values, vectors = eigh(matrix, keep)
    total = max(matrix.diagonal().sum().item(), 0.0)
    return Projector(values, total, root.expand(vectors), root.contract(vectors))


def factors(weight: Tensor, projector: Projector, rank: int) -> tuple[Tensor, Tensor]:
    """Factor Ŵ_r = A B, the best approximation of W of that rank.

    On the output side (m ≤ n) Ŵ = P_r W, on the input side Ŵ = W P_rᵀ. Each component's column of A and row of B are
    given the same norm, so that neither overflows or vanishes in half precision.

    Parameters
    ----------
    weight
        W, (m, n).
    projector
        What :func:`decompose` returned for W on its smaller side, k = min(m, n).
    rank
        r, from 0 to the projector's r_max.

    Returns
    -------
    tuple of Tensor
        A, (m, r), and B, (r, n), in the projector's dtype and on its device.

    Raises
    ------
    InputError
        If the rank or the projector does not fit.
    """
    shape = (weight.shape[0], weight.shape[1])
    size, largest = projector.expand.shape
    if size != min(shape):
        raise InputError(
            f"A matrix of shape {shape} needs a projector of its smaller side, {min(shape)}, got one of size {size}."
        )
    if not 0 <= rank <= largest:
        raise InputError(
            f"The rank of this matrix of shape {shape} must lie between 0 and {largest}, got {rank}. Score again to "
            "keep more components."
        )
    weight = weight.to(projector.expand)
    expand, contract = projector.expand[:, :rank], projector.contract[:rank]
    left, right = (expand, contract @ weight) if smaller_side(shape) == "out" else (weight @ contract.mT, expand.mT)
    norms = torch.linalg.vector_norm(left, dim=0), torch.linalg.vector_norm(right, dim=1)
    # A component that is zero on one side is made zero on both.
    scale = (norms[1] / norms[0]).nan_to_num_(nan=0.0, posinf=0.0).sqrt_()
    return left * scale, right * scale.reciprocal().nan_to_num_(posinf=0.0)[:, None]
