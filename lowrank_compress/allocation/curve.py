"""What a target group may be stored as: points of stored elements against loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lowrank_compress.allocation.choice import DENSE, Choice, Choices
from lowrank_compress.errors import InputError


@dataclass(frozen=True, eq=False)
class Curve:
    """The points that one target group may be stored at, cheapest first; the last one is dense and loses nothing.

    What is behind a point is the format's matter: allocators look at what points store and lose.

    Parameters
    ----------
    name
        For messages and reports.
    choices
        Of all points but the last.
    stored
        (p,) int64: strictly increasing; the last one is the dense element count.
    loss
        (p,) float64: non-increasing, finite; the last one is 0.
    spectrum
        Singular values of the weight itself, descending, for allocators that ask for it.
    block
        Index of the transformer block that the group belongs to.
    influence
        That block's influence, 1 − the mean cosine of its input and output, for allocators that ask for it.

    Raises
    ------
    InputError
        If the arrays are not such a curve.
    """

    name: str
    choices: Choices
    stored: np.ndarray
    loss: np.ndarray
    spectrum: np.ndarray | None = None
    block: int = 0
    influence: float | None = None

    def __post_init__(self) -> None:
        sizes = {array.shape for array in (self.stored, self.loss)}
        if len(sizes) != 1 or len(size := sizes.pop()) != 1 or size[0] != len(self.choices) + 1:
            self._refuse("a stored count and a loss for each choice and for dense", "arrays of different or no length")
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
        """Elements of the uncompressed group."""
        return int(self.stored[-1])

    @property
    def ranks(self) -> np.ndarray:
        """(p − 1,) int64: the first parameter of every choice, which is the rank where there is such."""
        return self.choices.parameters[:, 0]

    def choice(self, point: int) -> Choice:
        """Return what is behind a point."""
        return DENSE if point in (-1, len(self.choices)) else self.choices[point]


def make_curve(
    name: str,
    dense: int,
    choices: Choices,
    loss: np.ndarray,
    *,
    spectrum: np.ndarray | None = None,
    block: int = 0,
    influence: float | None = None,
) -> Curve:
    """Make a curve of the choices that store less than dense, and dense; of dense alone where none does.

    Of choices on a grid of several parameters only those are points that lose less than all cheaper ones.

    Parameters
    ----------
    name, spectrum, block, influence
        See :class:`Curve`.
    dense
        Elements of the uncompressed group.
    choices
        Without dense; stored elements never fall.
    loss
        (choices,) of each.

    Raises
    ------
    InputError
        If the losses of choices with one parameter rise, or anything is not finite.
    """
    loss = np.asarray(loss, dtype=np.float64)
    paying = choices.stored < dense
    if choices.parameters.shape[1] > 1:
        paying &= _front(choices.stored, loss)
    choices, loss = choices.where(paying), loss[paying]
    return Curve(
        name, choices, np.append(choices.stored, dense), np.append(loss, 0.0), spectrum, block, influence
    )  # fmt: skip


def _front(stored: np.ndarray, loss: np.ndarray) -> np.ndarray:
    """Tell which points lose less than all that store no more, (points,) bool; the first of equal ones."""
    order = np.lexsort((loss, stored))
    best = np.minimum.accumulate(loss[order])
    kept = np.zeros(len(loss), dtype=bool)
    kept[order] = np.append(True, best[1:] < best[:-1]) if len(order) else True
    return kept


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
