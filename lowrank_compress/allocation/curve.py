"""What a matrix (or module) may be stored as: points of stored elements against loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lowrank_compress.errors import InputError

DENSE = -1
"""The rank of the last point of every curve: stored as it was."""


@dataclass(frozen=True, eq=False)
class Curve:
    """The choices for one matrix or module, cheapest first; the last one is dense and loses nothing.

    Parameters
    ----------
    name
        For messages and reports.
    ranks
        (p,) int64: strictly increasing, then ``DENSE``.
    stored
        (p,) int64: strictly increasing; the last one is the dense element count.
    loss
        (p,) float64: non-increasing, finite; the last one is 0.
    spectrum
        Singular values of the weight itself, descending, for allocators that ask for it.
    block
        Index of the transformer block that the matrix or module belongs to.
    influence
        That block's influence, 1 − the mean cosine of its input and output, for allocators that ask for it.

    Raises
    ------
    InputError
        If the arrays are not such a curve.
    """

    name: str
    ranks: np.ndarray
    stored: np.ndarray
    loss: np.ndarray
    spectrum: np.ndarray | None = None
    block: int = 0
    influence: float | None = None

    def __post_init__(self) -> None:
        sizes = {array.shape for array in (self.ranks, self.stored, self.loss)}
        if len(sizes) != 1 or len(size := sizes.pop()) != 1 or size[0] < 1:
            self._refuse("one rank, stored count and loss for each point", "arrays of different or no length")
        if self.ranks[-1] != DENSE or np.any(np.diff(self.ranks[:-1]) <= 0) or np.any(self.ranks[:-1] < 1):
            self._refuse(f"ranks that rise from 1 or more and end in DENSE ({DENSE})", _ends(self.ranks))
        if np.any(np.diff(self.stored) <= 0) or self.stored[0] < 0:
            self._refuse("stored counts that strictly rise", _ends(self.stored))
        if not np.isfinite(self.loss).all() or np.any(np.diff(self.loss) > 0) or self.loss[-1] != 0:
            self._refuse("finite losses that never rise and end in 0", _ends(self.loss))

    def _refuse(self, expected: str, got: str) -> None:
        raise InputError(
            f"The curve of {self.name} is not one: expected {expected}, got {got}. Check the method that made it."
        )

    def __len__(self) -> int:
        return len(self.stored)

    @property
    def dense(self) -> int:
        """Elements of the uncompressed matrix or module."""
        return int(self.stored[-1])


def make_curve(
    name: str,
    dense: int,
    ranks: np.ndarray,
    stored: np.ndarray,
    loss: np.ndarray,
    *,
    spectrum: np.ndarray | None = None,
    block: int = 0,
    influence: float | None = None,
) -> Curve:
    """Make a curve of the candidates that store less than dense, and dense; of dense alone where none does.

    Parameters
    ----------
    name, spectrum, block, influence
        See :class:`Curve`.
    dense
        Elements of the uncompressed matrix or module.
    ranks, stored, loss
        (p,) of the candidates, without dense: ranks strictly increasing from 1 or more, stored strictly increasing,
        loss non-increasing.

    Raises
    ------
    InputError
        If the candidates are not such arrays.
    """
    ranks, stored = np.asarray(ranks, dtype=np.int64), np.asarray(stored, dtype=np.int64)
    loss = np.asarray(loss, dtype=np.float64)
    count = int(np.count_nonzero(stored < dense))
    return Curve(
        name,
        np.append(ranks[:count], DENSE),
        np.append(stored[:count], dense),
        np.append(loss[:count], 0.0),
        spectrum,
        block,
        influence,
    )


def stored_total(curves: Sequence[Curve], choice: np.ndarray) -> int:
    """Return Σ stored elements of the chosen points."""
    return sum(int(curve.stored[point]) for curve, point in zip(curves, choice, strict=True))


def least_stored(curves: Sequence[Curve], **_: object) -> int:
    """Return Σ stored elements of the cheapest points, whatever an allocator's options."""
    return sum(int(curve.stored[0]) for curve in curves)


def require_reachable(curves: Sequence[Curve], limit: int) -> None:
    """Raise InputError if even the cheapest points together exceed the limit."""
    least = least_stored(curves)
    if least > limit:
        raise InputError(
            f"{len(curves)} matrices cannot be stored in {limit} elements: at the smallest ranks they need {least}. "
            "Ask for a smaller ratio."
        )


def _ends(values: np.ndarray) -> str:
    return np.array2string(values, threshold=8, edgeitems=3)
