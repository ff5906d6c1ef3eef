"""What a spectrum says of a matrix: how many directions it really has, how its tail falls; exactly and by estimate."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_compress.errors import InputError, NumericsError

# Squares of singular values that are smaller than the largest by this factor are rounding of the Gram matrix.
ROUNDING = 1e-13
# Fewer points are no distribution that an exponent could be fitted to.
FEWEST = 10


def singular_values(matrix: Tensor) -> Tensor:
    """Singular values of W (m, n), largest first, (min(m, n),) float64, from the Gram matrix of the smaller side.

    Values below about 3e-7 of the largest are not told from 0, and returned as such.

    Raises
    ------
    NumericsError
        W is not finite.
    """
    if not bool(torch.isfinite(matrix.sum())):
        raise NumericsError(f"Expected a finite matrix, got a {tuple(matrix.shape)} one with NaN or infinite entries.")
    wide = matrix.double()
    gram = wide @ wide.T if len(wide) <= wide.shape[1] else wide.T @ wide
    squares = torch.linalg.eigvalsh(gram).flip(0).clamp(min=0)
    return torch.where(squares > ROUNDING * squares[0], squares, 0.0).sqrt()


def stable_rank(values: Tensor) -> float:
    """Σσ² / σ₁², from singular values: at most the rank, and not moved by small ones (M. Rudelson, R. Vershynin, 2007).

    0 for the zero matrix.
    """
    largest = float(values.max())
    return float((values / largest).square().sum()) if largest else 0.0


def entropy(shares: Tensor) -> float:
    """−Σ p log p in nats of non-negative numbers, taken as shares p of their sum; 0 for zeros alone."""
    total = float(shares.sum())
    if not total:
        return 0.0
    p = shares[shares > 0] / total
    return float(-(p * p.log()).sum())


def effective_rank(values: Tensor) -> float:
    """exp(H(σ / Σσ)) of singular values: from 1, for a single direction, to their number, for equal ones.

    O. Roy, M. Vetterli, The effective rank, EUSIPCO 2007. 0 for the zero matrix.
    """
    return math.exp(entropy(values)) if float(values.sum()) else 0.0


@dataclass(frozen=True)
class PowerLaw:
    """A power law p(λ) ∝ λ^−α of the eigenvalues from `least` on.

    Attributes
    ----------
    alpha
        α.
    least
        The eigenvalue that the tail begins with.
    distance
        Largest distance of the tail's distribution from the law (Kolmogorov–Smirnov).
    count
        Eigenvalues in the tail.
    """

    alpha: float
    least: float
    distance: float
    count: int


def power_law(values: Tensor) -> PowerLaw | None:
    """Fit a power law to the tail of the eigenvalues λ = σ² of WᵀW, as WeightWatcher does from 20 eigenvalues on.

    For every eigenvalue as the tail's beginning the exponent of greatest likelihood is 1 + n / Σ log(λ / λ_min); taken
    is the beginning from which the law is nearest to the eigenvalues (A. Clauset, C. Shalizi, M. Newman, SIAM Review
    51, 2009, section 3). Well-trained layers have α from 2 to 6 (C. Martin, T. Peng, M. Mahoney, Nature Communications
    12, 2021).

    Parameters
    ----------
    values
        Singular values; zeros are left out.

    Returns
    -------
    PowerLaw or None
        None where fewer than ten eigenvalues, or but one value, are there.
    """
    tail = values[values > 0].double().square().sort().values
    size = len(tail)
    if size < FEWEST or float(tail[0]) == float(tail[-1]):
        return None
    logs = tail.log()
    counts = torch.arange(size, 0, -1, dtype=torch.float64)
    excess = logs.flip(0).cumsum(0).flip(0) - counts * logs
    best: PowerLaw | None = None
    for first in range(size - 1):
        count, spread = size - first, float(excess[first])
        if spread <= 0:
            continue
        alpha = 1 + count / spread
        expected = 1 - (-(alpha - 1) * (logs[first:] - logs[first])).exp()
        found = torch.arange(count, dtype=torch.float64) / count
        distance = float((expected - found).abs().max())
        if best is None or distance < best.distance:
            best = PowerLaw(alpha, float(tail[first]), distance, count)
    return best


def normalised(states: Tensor) -> Tensor:
    """Centre representations (tokens, width) over the tokens, and give each the norm 1; float64.

    A token that is the mean itself stays 0.

    Raises
    ------
    InputError
        There are fewer than two tokens.
    """
    if states.ndim != 2 or len(states) < 2:
        raise InputError(f"Representations of at least two tokens are needed, got the shape {tuple(states.shape)}.")
    centred = states.double() - states.double().mean(0)
    return torch.nn.functional.normalize(centred, dim=1)


def matrix_entropy(states: Tensor) -> float:
    """Von Neumann entropy −tr K log K in nats of K = XᵀX / tr XᵀX, X the `normalised` representations.

    From 0, where all lie on one line, to log min(tokens − 1, width); its exponential is the effective rank of K (L. Wei
    et al., Diff-eRank, NeurIPS 2024). It takes the eigenvalues of K, O(n³).

    Parameters
    ----------
    states
        (tokens, width).
    """
    return entropy(singular_values(normalised(states)).square())


def nuclear_norm(matrix: Tensor) -> float:
    """Sum of the singular values, exactly (up to what `singular_values` says)."""
    return float(singular_values(matrix).sum())


def nuclear_norm_estimate(matrix: Tensor) -> float:
    """Sum of the largest min(m, n) norms of columns of X (m, n): an estimate of the nuclear norm in O(m n).

    The L₁,₂ norm: exact where the columns are orthogonal; with all columns (n ≤ m) never less than the nuclear norm,
    as X is the sum of its columns, each a matrix of rank 1 whose nuclear norm is the column's.
    """
    norms = matrix.double().norm(dim=0)
    return float(norms.topk(min(matrix.shape)).values.sum())


def matrix_nuclear_norm(states: Tensor, *, exact: bool = False) -> float:
    """Nuclear norm of the `normalised` representations by token: how many directions they use, without an SVD.

    Y. Li, T. Xia, Y. Chang, Y. Wu, Large Language Model Evaluation via Matrix Nuclear-Norm, arXiv 2410.10672: the
    estimate by columns in the place of the entropy.

    Parameters
    ----------
    states
        (tokens, width).
    exact
        Take the singular values instead, to see how far off the estimate is.
    """
    unit = normalised(states)
    return (nuclear_norm(unit) if exact else nuclear_norm_estimate(unit)) / len(unit)
