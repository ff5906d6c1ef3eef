"""A low-rank pair: Ŵ = A B."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lowrank_compress.formats.ranked import Ranked
from lowrank_compress.formats.spec import Encoded, Shape


class Pair(Ranked):
    """r(m + n) elements: B, (r, n), and A, (m, r)."""

    name = "pair"
    help = "two factors, r(m + n) elements"

    def elements(self, shape: Shape, ranks: np.ndarray) -> np.ndarray:
        """r(m + n)."""
        return ranks * (shape[0] + shape[1])

    def store(self, left: Tensor, right: Tensor) -> Encoded:
        """Take the factors as they are."""
        shape = (left.shape[0], right.shape[1])
        return Encoded(self.name, (len(right),), shape, right, {"lr_out.weight": left})

    def rebuild(self, part: Encoded, dtype: torch.dtype) -> Tensor:
        """Multiply them."""
        return part.others["lr_out.weight"].to(dtype) @ part.inner.to(dtype)
