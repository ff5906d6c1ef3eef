"""From the ratio that was asked for to a number of stored elements."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from lowrank_compress.allocation.curve import Curve
from lowrank_compress.errors import InputError


@dataclass(frozen=True)
class Budget:
    """How much may be stored so that at least ``ratio`` of ``denominator`` elements disappears.

    Parameters
    ----------
    ratio
        The share to remove, in (0, 1), taken as the decimal number that was written.
    denominator
        Elements that the ratio refers to: of all claimed weights inside the blocks, or of the whole model.
    other
        Those of the denominator that no curve stands for and that stay as they are.
    more
        Elements that are stored in addition, whatever the curves' choices; fewer if negative.

    Raises
    ------
    InputError
        For a ratio outside (0, 1), where there is anything to compress; or counts that cannot be.
    """

    ratio: float
    denominator: int
    other: int
    more: int = 0

    def __post_init__(self) -> None:
        if not (0 < self.ratio < 1 or (self.ratio == 0 and self.other == self.denominator)):
            raise InputError(
                f"The ratio is the share of parameters to remove and must lie between 0 and 1, got {self.ratio}. "
                "Use for instance 0.2."
            )
        if not 0 <= self.other <= self.denominator:
            raise InputError(
                f"A budget over {self.denominator} elements cannot leave {self.other} of them as they are. Count tied "
                "weights once."
            )

    @property
    def limit(self) -> int:
        """The largest number of stored elements for all curves together; not exceeding it reaches the ratio."""
        removed = math.ceil(Fraction(str(self.ratio)) * self.denominator)
        return self.denominator - self.other - self.more - removed

    def reached(self, stored: int) -> float:
        """Return the share that is removed when the curves' choices store that many elements."""
        return (self.denominator - self.other - self.more - stored) / self.denominator

    def check(self, curves: Sequence[Curve]) -> None:
        """Make sure that the curves fit this budget.

        Raises
        ------
        InputError
            If the ratio is out of reach, naming the largest one that is not; or if the curves' dense elements and
            ``other`` are not together the denominator.
        """
        dense = sum(curve.dense for curve in curves)
        if dense + self.other != self.denominator:
            raise InputError(
                f"The budget counts {self.denominator} elements, but the matrices to compress have {dense} and "
                f"{self.other} stay as they are. Make the budget from the same targets as the curves."
            )
        self.require(sum(int(curve.stored[0]) for curve in curves))

    def largest(self, least: int) -> float:
        """Return the largest ratio that can be asked for where no fewer than `least` elements can be stored."""
        # Rounded down, so that the ratio named here is one that can be asked for.
        return math.floor(Fraction(self.denominator - self.other - self.more - least, self.denominator) * 10**4) / 10**4

    def require(self, least: int, advice: str = "") -> None:
        """Make sure that `least`, the fewest elements that can be stored, are within the limit.

        Parameters
        ----------
        least
            For all curves together.
        advice
            What else could be done than to ask for less.

        Raises
        ------
        InputError
            They are not; the message names the largest ratio that can be reached.
        """
        if least <= self.limit:
            return
        other = f" and {self.other} are not compressed" if self.other else ""
        largest = self.largest(least)
        raise InputError(
            f"A ratio of {self.ratio} is out of reach: what is to be compressed still needs {least} elements at the "
            f"smallest ranks{other}, of {self.denominator} in all. "
            + (f"The largest reachable ratio is {largest}. " if largest > 0 else "Nothing can go. ")
            + (advice or "Ask for no more.")
        )
