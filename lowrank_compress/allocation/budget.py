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

    Raises
    ------
    InputError
        For a ratio outside (0, 1), or counts that cannot be.
    """

    ratio: float
    denominator: int
    other: int

    def __post_init__(self) -> None:
        if not 0 < self.ratio < 1:
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
        return self.denominator - self.other - math.ceil(Fraction(str(self.ratio)) * self.denominator)

    def reached(self, stored: int) -> float:
        """Return the share that is removed when the curves' choices store that many elements."""
        return (self.denominator - self.other - stored) / self.denominator

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
        least = sum(int(curve.stored[0]) for curve in curves)
        if least > self.limit:
            # Rounded down, so that the ratio named here is one that can be asked for.
            largest = math.floor(self.reached(least) * 10**4) / 10**4
            raise InputError(
                f"A ratio of {self.ratio} is out of reach: at the smallest ranks the {len(curves)} matrices still need "
                f"{least} elements and {self.other} are not compressed, of {self.denominator} in all. The largest "
                f"reachable ratio is {largest}. Ask for less, or compress more of the model."
            )
