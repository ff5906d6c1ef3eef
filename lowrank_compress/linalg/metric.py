"""The metrics L and R of ‖L (W − Ŵ) R‖_F, each held as its square.

On the side that is only measured (the far side) a metric is needed as a quadratic form and may be of any rank. On the
side that is decomposed (the near side) it is needed as an invertible root C, C Cᵀ = metric + damping. The choice of
root does not matter: another root is C Q with Q orthogonal, and Q cancels in every result.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from lowrank_compress.errors import InputError, NumericsError
from lowrank_compress.linalg.lapack import congruence

# Relative to the mean diagonal. A pivot of the root below FLOOR is rounding, not information; jitter lifts it.
JITTERS = (0.0, 1e-12, 1e-10, 1e-8, 1e-6, 1e-4)
# Relative to each entry of the diagonal: what sums in float32 are wrong by is relative to these, and where a few are a
# thousand times as large as the mean (massive activations; Sun et al., COLM 2024), it is more than the jitter of all.
OWN_JITTERS = (1e-6, 1e-5, 1e-4, 1e-3)
FLOOR = 1e-13
# Columns of a triangle that are multiplied at once.
PANEL = 512


class Root(Protocol):
    """An invertible root C of a metric: C Cᵀ = metric + damping. All tensors are float64 and share a device."""

    def congruence(self, form: Tensor) -> Tensor:
        """Return Cᵀ P C for the symmetric form P, both (k, k)."""
        ...

    def expand(self, vectors: Tensor) -> Tensor:
        """Return C⁻ᵀ U for U of shape (k, r)."""
        ...

    def contract(self, vectors: Tensor) -> Tensor:
        """Return Uᵀ Cᵀ, of shape (r, k), for U of shape (k, r)."""
        ...


@dataclass(frozen=True)
class IdentityRoot:
    """C = I."""

    def congruence(self, form: Tensor) -> Tensor:
        """Return P itself."""
        return form

    def expand(self, vectors: Tensor) -> Tensor:
        """Return U itself."""
        return vectors

    def contract(self, vectors: Tensor) -> Tensor:
        """Return Uᵀ."""
        return vectors.mT


@dataclass(frozen=True, eq=False)
class DiagonalRoot:
    """C = diag(scale), scale of shape (k,) and positive."""

    scale: Tensor

    def congruence(self, form: Tensor) -> Tensor:
        """Return Cᵀ P C."""
        return (form * self.scale).mul_(self.scale[:, None])

    def expand(self, vectors: Tensor) -> Tensor:
        """Return C⁻ᵀ U."""
        return vectors / self.scale[:, None]

    def contract(self, vectors: Tensor) -> Tensor:
        """Return Uᵀ Cᵀ."""
        return vectors.mT * self.scale


@dataclass(frozen=True, eq=False)
class TriangularRoot:
    """C = lower, a (k, k) lower triangular matrix with a positive diagonal."""

    lower: Tensor

    def congruence(self, form: Tensor) -> Tensor:
        """Return Cᵀ P C, exactly symmetric."""
        if form.is_cpu:
            # The transpose of a C-ordered symmetric matrix is the same matrix in Fortran's order.
            result = form.to(torch.float64, copy=True, memory_format=torch.contiguous_format)
            congruence(result.numpy().T, self.lower.mT.contiguous().numpy().T)
            return _mirrored(result)
        result = self.lower.mT @ form.double() @ self.lower
        return (result + result.mT) / 2

    def expand(self, vectors: Tensor) -> Tensor:
        """Return C⁻ᵀ U."""
        return torch.linalg.solve_triangular(self.lower.mT, vectors, upper=True)

    def contract(self, vectors: Tensor) -> Tensor:
        """Return Uᵀ Cᵀ."""
        turned = vectors.mT
        result = torch.empty_like(turned, memory_format=torch.contiguous_format)
        for start in range(0, len(vectors), PANEL):
            stop = start + PANEL
            torch.matmul(turned[:, :stop], self.lower[start:stop, :stop].mT, out=result[:, start:stop])
        return result


@dataclass(frozen=True)
class Identity:
    """The metric I: every output (or input) counts the same."""

    def form(self, weight: Tensor) -> Tensor:
        """Return W Wᵀ, (p, p) float64, for W of shape (p, k); of 16-bit weights, in part summed in float32."""
        return _square(weight)

    def root(self) -> Root:
        """Return the root I; there is nothing to damp."""
        return IdentityRoot()


@dataclass(frozen=True, eq=False)
class Diagonal:
    """The metric diag(weights).

    Parameters
    ----------
    weights
        (k,), non-negative: the *squares* of the entries of L or R.
    shrinkage
        α in [0, 1]: as a root, weights become (1 − α) weights + α · mean(weights).

    Raises
    ------
    InputError
        For a wrong shape or a shrinkage outside [0, 1].
    NumericsError
        For weights that are negative or not finite.
    """

    weights: Tensor
    shrinkage: float = 0.0

    def __post_init__(self) -> None:
        if self.weights.ndim != 1:
            raise InputError(f"A diagonal metric needs weights of shape (k,), got {tuple(self.weights.shape)}.")
        _check(self.weights, self.shrinkage, "diagonal metric")
        if bool((self.weights < 0).any()):
            raise NumericsError(
                f"The weights of a diagonal metric are squares and cannot be negative; the least one is "
                f"{self.weights.min().item():.3g}. Check the statistic they were made from."
            )

    def form(self, weight: Tensor) -> Tensor:
        """Return W diag(weights) Wᵀ without damping, (p, p) float64, for W of shape (p, k)."""
        return _square(weight.double() * self.weights.double().sqrt())

    def root(self) -> Root:
        """Return diag(√weights) after shrinkage; weights that are still zero get the least jitter that lifts them."""
        weights = self.weights.double()
        scale = _scale(weights)
        damped = (1 - self.shrinkage) * weights + self.shrinkage * scale
        if bool(damped.min() <= FLOOR * scale):
            damped += JITTERS[1] * scale
        return DiagonalRoot(damped.sqrt_())


@dataclass(frozen=True, eq=False)
class Full:
    """A full second moment as metric, for instance a Gram matrix E[x xᵀ] or a Fisher matrix E[g gᵀ].

    Parameters
    ----------
    moment
        (k, k), symmetric and positive semi-definite, of any rank.
    shrinkage
        α in [0, 1]: as a root, M becomes (1 − α) M + α · mean(diag M) · I. It is what makes directions that were
        never seen in the sample cost something: a pseudo-inverse would delete them.

    Raises
    ------
    InputError
        For a wrong shape or a shrinkage outside [0, 1].
    NumericsError
        For a moment that is not finite.
    """

    moment: Tensor
    shrinkage: float = 0.0

    def __post_init__(self) -> None:
        if self.moment.ndim != 2 or self.moment.shape[0] != self.moment.shape[1]:
            raise InputError(f"A full metric needs a moment of shape (k, k), got {tuple(self.moment.shape)}.")
        _check(self.moment, self.shrinkage, "full metric")

    def form(self, weight: Tensor) -> Tensor:
        """Return W M Wᵀ without damping, (p, p) float64, for W of shape (p, k)."""
        weight = weight.double()
        return weight @ self.moment.double() @ weight.mT

    def root(self) -> TriangularRoot:
        """Return the Cholesky factor of the damped moment.

        Where shrinkage alone does not make the moment positive definite, jitter is added to the diagonal and
        escalates (a habit of linear_operator, ``utils/cholesky.py``); first as much to all, then to each in proportion.

        Raises
        ------
        NumericsError
            If the moment is still not positive definite at the last jitter.
        """
        moment = self.moment.double()
        scale = _scale(moment.diagonal())
        damped = torch.empty_like(moment, memory_format=torch.contiguous_format)
        # The transpose of a C-ordered symmetric matrix is the same matrix in LAPACK's order: it is factored in place.
        lower, info = damped.mT, torch.empty((), dtype=torch.int32, device=moment.device)
        for jitter, own in [*((jitter, 0.0) for jitter in JITTERS), *((0.0, own) for own in OWN_JITTERS)]:
            torch.add(moment, moment.mT, out=damped).mul_((1 - self.shrinkage) / 2)
            damped.diagonal().add_((self.shrinkage + jitter) * scale)
            if own:
                damped.diagonal().add_(moment.diagonal(), alpha=own)
            torch.linalg.cholesky_ex(lower, out=(lower, info))
            if int(info) == 0 and bool(lower.diagonal().square().min() > FLOOR * scale):
                return TriangularRoot(lower)
        raise NumericsError(
            f"A {len(moment)}x{len(moment)} second moment is not positive definite: expected a Cholesky factor after "
            f"a shrinkage of {self.shrinkage:g}, got none even with {JITTERS[-1]:g} of its mean diagonal added, or "
            f"{OWN_JITTERS[-1]:g} of each entry of it. Use more calibration tokens or a larger shrinkage."
        )

    def inverse(self) -> Tensor:
        """Return the upper triangle of the inverse of the damped moment, (k, k) contiguous.

        What lies below the diagonal means nothing.

        Raises
        ------
        NumericsError
            As :meth:`root`, in whose memory the inverse is computed.
        """
        lower = self.root().lower
        if not lower.is_cpu:
            return torch.cholesky_inverse(lower).mT.contiguous()
        # LAPACK's own routine leaves out the other triangle: measured, twice as fast as torch.
        (potri,) = scipy.linalg.get_lapack_funcs(("potri",), dtype=np.float64)
        inverse, _ = potri(lower.numpy(), lower=True, overwrite_c=True)
        return torch.from_numpy(inverse).mT


Metric: TypeAlias = Identity | Diagonal | Full


def _square(weight: Tensor) -> Tensor:
    """Return W Wᵀ in float64; in panels, so that little more than one triangle is computed.

    Float32 holds the products of 16-bit numbers exactly: of such weights, those of PANEL columns are summed in it, as
    those of tokens are in second moments, and the sums in float64.
    """
    exact = weight.dtype in (torch.float16, torch.bfloat16)
    weight = weight.to(torch.float32 if exact else torch.float64)
    depth = PANEL if exact else max(1, weight.shape[1])
    result = weight.new_zeros(len(weight), len(weight), dtype=torch.float64)
    for start in range(0, len(weight), PANEL):
        panel = slice(start, start + PANEL)
        for part in weight.split(depth, dim=1):
            result[panel, start:] += part[panel] @ part[start:].mT
    return _mirrored(result)


def _mirrored(upper: Tensor) -> Tensor:
    """Copy the upper triangle of (k, k) to the lower one, in place and in panels."""
    for start in range(0, len(upper), PANEL):
        panel = slice(start, start + PANEL)
        upper[panel.stop :, panel] = upper[panel, panel.stop :].mT
        corner = upper[panel, panel]
        corner.copy_(corner.triu() + corner.triu(1).mT)
    return upper


def _scale(diagonal: Tensor) -> float:
    """Return the mean of a moment's diagonal, the unit of damping; 1 if there is none to speak of."""
    mean = diagonal.mean().item()
    return mean if mean > 0 else 1.0


def _check(moment: Tensor, shrinkage: float, what: str) -> None:
    if not 0 <= shrinkage <= 1:
        raise InputError(f"The shrinkage of a {what} must lie in [0, 1], got {shrinkage}.")
    # A sum is finite only if all terms are, and needs no matrix of truth values.
    if not bool(torch.isfinite(moment.sum())) and (bad := int((~torch.isfinite(moment)).sum())):
        raise NumericsError(
            f"A {what} must be finite, but {bad} of its {moment.numel()} entries are not. Activations or gradients "
            "overflowed while the statistics were taken: calibrate in float32 or bfloat16."
        )
