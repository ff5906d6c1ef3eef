"""What a matrix costs in each storage format, in stored elements."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import overload

import numpy as np

from lowrank_compress.errors import InputError
from lowrank_compress.registry import unknown

# Stored elements of a matrix of shape (m, n) at rank r. A pair is A·B; a pivot matrix is r rows, the coefficients of
# the other m − r, and r indices.
FORMATS: Mapping[str, Callable] = {
    "pair": lambda m, n, r: r * (m + n),
    "pivot": lambda m, n, r: r * (m + n - r) + r,
    "dense": lambda m, n, r: m * n + 0 * r,
}
# What a user may ask for; "auto" takes one of the formats for each matrix.
STORAGES = ("pair", "pivot", "auto")


@overload
def cost(storage: str, shape: tuple[int, int], rank: int) -> int: ...
@overload
def cost(storage: str, shape: tuple[int, int], rank: np.ndarray) -> np.ndarray: ...
def cost(storage: str, shape: tuple[int, int], rank: int | np.ndarray) -> int | np.ndarray:
    """Return the stored elements of a matrix at a rank.

    All formats grow with the rank up to min(m, n), the concave pivot cost included. "auto" is planned at the cheaper of
    pair and pivot.

    Parameters
    ----------
    storage
        A name of ``FORMATS`` or "auto".
    shape
        (out, in) = (m, n).
    rank
        An int, or an int64 array for many ranks at once; the result is of the same type.

    Raises
    ------
    InputError
        For an unknown storage.
    """
    if storage == "auto":
        cheaper = np.minimum(cost("pair", shape, rank), cost("pivot", shape, rank))
        return cheaper if isinstance(rank, np.ndarray) else int(cheaper)
    if storage not in FORMATS:
        raise InputError(unknown("storage", storage, [*FORMATS, "auto"]))
    return FORMATS[storage](*shape, rank)


def largest_rank(storage: str, shape: tuple[int, int], stored: int, multiple: int = 1) -> int:
    """Return the largest rank r ≤ min(m, n) that costs at most ``stored`` elements, 0 if none does.

    Only multiples of ``multiple`` count.
    """
    ranks = np.arange(multiple, min(shape) + 1, multiple, dtype=np.int64)
    return multiple * int(np.searchsorted(cost(storage, shape, ranks), stored, side="right"))
