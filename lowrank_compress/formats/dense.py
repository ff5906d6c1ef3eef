"""A matrix as it is: parts of a fused weight whose other parts are compressed."""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank_compress.formats.spec import Encoded


def dense(weight: Tensor) -> Encoded:
    """Store a matrix, (out, in), as it is."""
    return Encoded("dense", (), (weight.shape[0], weight.shape[1]), weight)


def rebuild(part: Encoded, dtype: torch.dtype) -> Tensor:
    """Return it, in a dtype."""
    return part.inner.to(dtype)
