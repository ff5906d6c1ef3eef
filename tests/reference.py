"""Slow, obvious versions of the mathematics, for tests only: dense inverses, explicit roots, brute force."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import scipy.linalg
import scipy.optimize

from lowrank_compress.allocation.curve import Curve


def square_root(moment: np.ndarray) -> np.ndarray:
    """Return the symmetric S with S S = M."""
    values, vectors = np.linalg.eigh(moment)
    return (vectors * np.sqrt(values.clip(min=0))) @ vectors.T


def damp(moment: np.ndarray, shrinkage: float) -> np.ndarray:
    """Return (1 − α) M + α · mean(diag M) · I."""
    scale = np.mean(np.diag(moment)) or 1.0
    return (1 - shrinkage) * moment + shrinkage * scale * np.eye(len(moment))


def metric_loss(error: np.ndarray, output: np.ndarray, inputs: np.ndarray) -> float:
    """Return ‖L E R‖² for the squared metrics L² (m, m) and R² (n, n)."""
    return float(np.trace(output @ error @ inputs @ error.T))


def weighted_tail(weight: np.ndarray, output: np.ndarray, inputs: np.ndarray) -> np.ndarray:
    """Return Σ_{i>r} σ_i² of L W R for r = 0 … k."""
    values = np.linalg.svd(square_root(output) @ weight @ square_root(inputs), compute_uv=False)
    return np.array([np.sum(values[rank:] ** 2) for rank in range(len(values) + 1)])


def weighted_svd(weight: np.ndarray, output: np.ndarray, inputs: np.ndarray, rank: int) -> np.ndarray:
    """Return Ŵ = L⁻¹ U_r Σ_r V_rᵀ R⁻¹ from the SVD of L W R; both metrics must be invertible."""
    left, right = square_root(output), square_root(inputs)
    u, s, v = np.linalg.svd(left @ weight @ right, full_matrices=False)
    return np.linalg.inv(left) @ (u[:, :rank] * s[:rank]) @ v[:rank] @ np.linalg.inv(right)


def alternating_least_squares(
    weight: np.ndarray, output: np.ndarray, inputs: np.ndarray, rank: int, sweeps: int, rng: np.random.Generator
) -> np.ndarray:
    """Minimise ‖L (W − A B) R‖ from a random start, over B and A in turn, each by an explicit Kronecker product."""
    left, right = square_root(output), square_root(inputs)
    a = rng.normal(size=(weight.shape[0], rank))
    b = np.zeros((rank, weight.shape[1]))
    goal = (left @ weight @ right).ravel()
    for _ in range(sweeps):
        b = np.linalg.lstsq(np.kron(left @ a, right.T), goal, rcond=None)[0].reshape(b.shape)
        a = np.linalg.lstsq(np.kron(left, (b @ right).T), goal, rcond=None)[0].reshape(a.shape)
    return a @ b


def express_by_rows(matrix: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Return the least-squares coefficients of the rows that are not in ``index`` in the rows that are."""
    rest = np.setdiff1d(np.arange(len(matrix)), index)
    return np.linalg.lstsq(matrix[index].T, matrix[rest].T, rcond=None)[0].T


def best_choice(curves: Sequence[Curve], limit: int) -> float:
    """Return the least Σ loss over all combinations of points within the limit."""
    return min(
        sum(curve.loss[point] for curve, point in zip(curves, choice, strict=True))
        for choice in itertools.product(*(range(len(curve)) for curve in curves))
        if sum(curve.stored[point] for curve, point in zip(curves, choice, strict=True)) <= limit
    )


def relaxed_loss(curves: Sequence[Curve], limit: int) -> float:
    """Return the least Σ loss if a matrix could be any mixture of its points: the linear program itself."""
    loss = np.concatenate([curve.loss for curve in curves])
    stored = np.concatenate([curve.stored for curve in curves])
    one_each = scipy.linalg.block_diag(*(np.ones(len(curve)) for curve in curves))
    # In units of the largest loss and of the limit: the solver's tolerances are absolute.
    unit = loss.max() or 1.0
    solution = scipy.optimize.linprog(
        loss / unit, A_ub=stored[None] / limit, b_ub=[1.0], A_eq=one_each, b_eq=np.ones(len(curves)), method="highs"
    )
    assert solution.success, solution.message
    return float(solution.fun) * unit


def hull_steps(curve: Curve) -> list[float]:
    """Return the losses that the segments of the lower convex hull save, by testing every pair of points."""
    points = list(zip(curve.stored.tolist(), curve.loss.tolist(), strict=True))

    def on_hull(middle: int) -> bool:
        x, y = points[middle]
        return all(
            y < a[1] + (b[1] - a[1]) * (x - a[0]) / (b[0] - a[0]) for a in points[:middle] for b in points[middle + 1 :]
        )

    losses = [points[index][1] for index in range(len(points)) if on_hull(index)]
    return [before - after for before, after in itertools.pairwise(losses)]


def uniform_choice(curves: Sequence[Curve], limit: int) -> list[int]:
    """Try every kept share, the largest first."""
    for share in sorted({point / curve.dense for curve in curves for point in curve.stored.tolist()}, reverse=True):
        choice = [max([i for i, s in enumerate(curve.stored) if s / curve.dense <= share] or [0]) for curve in curves]
        if sum(curve.stored[i] for curve, i in zip(curves, choice, strict=True)) <= limit:
            return choice
    return [0] * len(curves)


def welore_choice(curves: Sequence[Curve], limit: int) -> list[int]:
    """Try every threshold that occurs, the smallest first; r = #{σ̂ ≥ τ}, dense where r is not cheaper than dense."""
    normalised = []
    for curve in curves:
        assert curve.spectrum is not None
        low, high = min(curve.spectrum), max(curve.spectrum)
        normalised.append([(value - low) / (high - low) for value in curve.spectrum])
    for threshold in sorted({value for values in normalised for value in values}):
        choice = []
        for curve, values in zip(curves, normalised, strict=True):
            rank = sum(value >= threshold for value in values)
            choice.append(curve.ranks.tolist().index(rank) if rank in curve.ranks else len(curve) - 1)
        if sum(curve.stored[i] for curve, i in zip(curves, choice, strict=True)) <= limit:
            return choice
    return [0] * len(curves)
