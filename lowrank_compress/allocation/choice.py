"""What allocators choose among: how something may be stored, and what that costs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Choice:
    """How a target group is stored.

    Attributes
    ----------
    format
        Name of the format; "dense" for what stays as it is.
    parameters
        What the format leaves open, in its own order: a rank, or the number of atoms and that of nonzeros.
    """

    format: str
    parameters: tuple[int, ...] = ()

    @property
    def is_dense(self) -> bool:
        """Whether it stays as it is."""
        return self.format == "dense"


DENSE = Choice("dense")


@dataclass(frozen=True, eq=False)
class Choices:
    """Several choices in one format, with what each stores.

    Attributes
    ----------
    format
        Name of the format.
    parameters
        (choices, parameters of the format) int64.
    stored
        (choices,) int64: elements, rising.
    indices
        (choices,) int64: how many of them are indices, which take other bytes than weights do.
    """

    format: str
    parameters: np.ndarray
    stored: np.ndarray
    indices: np.ndarray

    def __len__(self) -> int:
        return len(self.stored)

    def __getitem__(self, number: int) -> Choice:
        return Choice(self.format, tuple(self.parameters[number].tolist()))

    def where(self, chosen: np.ndarray | slice) -> Choices:
        """Return those that a mask, slice or list of numbers picks, in that order."""
        return Choices(self.format, self.parameters[chosen], self.stored[chosen], self.indices[chosen])


def of_ranks(format: str, ranks: np.ndarray, stored: np.ndarray, indices: np.ndarray | int = 0) -> Choices:
    """Make choices whose one parameter is a rank or a width.

    Parameters
    ----------
    ranks, stored, indices
        (choices,) int64.
    """
    ranks, stored = np.asarray(ranks, dtype=np.int64), np.asarray(stored, dtype=np.int64)
    return Choices(format, ranks[:, None], stored, np.broadcast_to(np.asarray(indices, dtype=np.int64), stored.shape))
