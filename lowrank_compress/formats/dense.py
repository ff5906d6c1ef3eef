"""A matrix as it is: a part of a fused weight whose other parts are compressed, or of a narrower module."""

from __future__ import annotations

from torch import Tensor

from lowrank_compress.formats.spec import Encoded


def dense(weight: Tensor) -> Encoded:
    """Store a matrix, (out, in), as it is."""
    return Encoded("dense", (), (weight.shape[0], weight.shape[1]), weight)
