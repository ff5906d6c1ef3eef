"""Lower triangles in half of the memory that squares of them take."""

from __future__ import annotations

import torch
from torch import Tensor


def packed(lower: Tensor) -> Tensor:
    """Fold a lower triangle L, (n, n), to a rectangle, (⌈n/2⌉, n + 1), that holds the same numbers.

    Row i of it is row n − 1 − i of L up to the diagonal, followed by row i of L from the diagonal on, backwards; as in
    LAPACK's rectangular full packed format every place is used (Gustavson et al., ACM TOMS 37, 2010).
    """
    half = (len(lower) + 1) // 2
    long, short = lower[len(lower) - half :].flip(0), lower[:half].flip(1)
    return torch.nn.functional.pad(long, (0, 1)) + torch.nn.functional.pad(short, (1, 0))


def unpacked(rectangle: Tensor) -> Tensor:
    """Return the lower triangle that was folded by :func:`packed`, bit for bit."""
    size = rectangle.shape[1] - 1
    longer = size - len(rectangle)
    short, long = rectangle[:, 1:].flip(1).tril(), rectangle[:, :-1].flip(0).tril(longer)
    return torch.cat([short[:longer], long])
