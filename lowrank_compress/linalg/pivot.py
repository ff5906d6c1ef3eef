"""Lossless storage of a low-rank matrix as r of its own rows and coefficients for the others.

PIFA (Pivoting Factorization, ICML 2025): Ŵ of rank r has r rows that span the others, so that r·n pivot rows,
(m − r)·r coefficients and r indices replace the r(m + n) of a pair. The rows are chosen by a QR decomposition with
column pivoting of Ŵᵀ and then exchanged until no coefficient exceeds a bound: in half precision large coefficients
would magnify the rounding of the pivot rows. That is strong rank-revealing QR (Gu and Eisenstat, SIAM J. Sci. Comput.
17, 1996, section 3) for a matrix of exact rank r, also known as maxvol.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from lowrank_compress.errors import InputError, NumericsError


@dataclass(frozen=True, eq=False)
class Pivot:
    """Ŵ as pivot rows and coefficients: Ŵ[index] = pivots, the other rows in ascending order = coefficients @ pivots.

    Parameters
    ----------
    index
        (r,) int64, ascending: which rows are pivots.
    pivots
        (r, n) float64.
    coefficients
        (m − r, r) float64, no magnitude above the bound that was asked for.
    """

    index: Tensor
    pivots: Tensor
    coefficients: Tensor

    def rebuild(self) -> Tensor:
        """Return the (m, n) matrix Ŵ."""
        rank, columns = self.pivots.shape
        rows = rank + len(self.coefficients)
        rest = torch.ones(rows, dtype=torch.bool, device=self.index.device)
        rest[self.index] = False
        matrix = self.pivots.new_empty(rows, columns)
        matrix[self.index] = self.pivots
        matrix[rest] = self.coefficients @ self.pivots
        return matrix


def pivot(left: Tensor, right: Tensor, bound: float = 2.0) -> Pivot:
    """Choose pivot rows of Ŵ = A B and express the other rows by them.

    Lossless: ``rebuild()`` equals A B up to the rounding of float64, also where A B has a smaller rank than r. Rows
    beyond the numerical rank are stored but used by no other row.

    Parameters
    ----------
    left
        A, (m, r) with 1 ≤ r < m.
    right
        B, (r, n).
    bound
        The largest magnitude of a coefficient, above 1; the smaller, the more exchanges.

    Raises
    ------
    InputError
        If shapes or the bound do not fit.
    NumericsError
        If a factor is not finite.
    """
    if left.ndim != 2 or right.ndim != 2 or left.shape[1] != right.shape[0]:
        raise InputError(
            f"Pivoting needs factors of shapes (m, r) and (r, n), got {tuple(left.shape)} and {tuple(right.shape)}."
        )
    rows, rank = left.shape
    if not 1 <= rank < rows:
        raise InputError(f"Pivoting needs 1 <= rank < rows, got rank {rank} and {rows} rows. Store it dense instead.")
    if not bound > 1:
        raise InputError(f"The bound on pivot coefficients must exceed 1, got {bound}.")
    left, right = left.double(), right.double()
    # Rows of A Rᵀ, with Bᵀ = Q R, have the same lengths and angles as rows of A B, at r columns instead of n.
    span = (left @ torch.linalg.qr(right.mT, mode="r").R.mT).cpu().numpy()
    if not np.isfinite(span).all():
        raise NumericsError(
            f"Expected finite factors of a matrix of shape {(rows, right.shape[1])} to pivot, got entries that are "
            "infinite or not a number. Check the weights and the statistics."
        )
    order, coefficients = _select(span, rank)
    coefficients = _exchange(span, order, coefficients, bound)
    # Everything so far is in the order of selection; what is stored is in the order of rows.
    chosen, others = np.argsort(order[:rank]), np.argsort(order[rank:])
    full = np.zeros((rows - rank, rank))
    full[:, : coefficients.shape[1]] = coefficients
    index = torch.from_numpy(order[:rank][chosen]).to(left.device)
    return Pivot(index, left[index] @ right, torch.from_numpy(full[np.ix_(others, chosen)]).to(left.device))


def _select(span: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Order the rows by QR with column pivoting of spanᵀ.

    Returns the order (m,) int64 of rows, and the coefficients (m − r, ρ) of rows order[r:] in rows order[:ρ], ρ ≤ r the
    numerical rank.
    """
    triangle, order = cast(
        tuple[np.ndarray, np.ndarray], scipy.linalg.qr(span.T, mode="r", pivoting=True, check_finite=False)
    )
    diagonal = np.abs(triangle.diagonal()[:rank])
    used = int(np.count_nonzero(diagonal > max(span.shape) * np.finfo(float).eps * diagonal[0]))
    solved = scipy.linalg.solve_triangular(triangle[:used, :used], triangle[:used, rank:], check_finite=False)
    return order.astype(np.int64), solved.T


def _exchange(span: np.ndarray, order: np.ndarray, coefficients: np.ndarray, bound: float) -> np.ndarray:
    """Exchange pivots with other rows, in ``order``, until no coefficient exceeds the bound; return the coefficients.

    An exchange of a pivot and a row multiplies the volume that the pivots span by the row's coefficient in that pivot,
    above 1 in magnitude: it ends.
    """
    others, used = coefficients.shape
    pivots, rest = order[:used], order[-others:]
    while coefficients.size and np.abs(coefficients).max() > bound:
        while True:
            row, column = np.unravel_index(np.abs(coefficients).argmax(), coefficients.shape)
            value = coefficients[row, column]
            if abs(value) <= bound:
                break
            pivots[column], rest[row] = rest[row], pivots[column]
            # old pivot = (new pivot − Σ of the row's other terms) / value: put that into every row.
            share = coefficients[:, column] / value
            share[row] = 1 / value
            entering = coefficients[row].copy()
            coefficients[row] = 0
            coefficients -= np.outer(share, entering)
            coefficients[:, column] = share
        # Updates accumulate rounding: solve afresh. With Q R the transpose of the pivots, C = rest Q R⁻ᵀ.
        basis, triangle = np.linalg.qr(span[pivots].T)
        coefficients = scipy.linalg.solve_triangular(triangle, (span[rest] @ basis).T, check_finite=False).T
    return coefficients
