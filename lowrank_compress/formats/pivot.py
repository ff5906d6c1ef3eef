"""Interpolative storage: r rows of Ŵ, and the coefficients of the others in them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lowrank_compress.formats.ranked import Ranked
from lowrank_compress.formats.spec import Encoded, Shape
from lowrank_compress.linalg.pivot import pivot


class Pivot(Ranked):
    """r(m + n − r) elements and r indices, for the very same Ŵ as a pair (PIFA, ICML 2025)."""

    name = "pivot"
    help = "rows of the product itself and coefficients for the others, r(m + n - r) + r elements"

    def elements(self, shape: Shape, ranks: np.ndarray) -> np.ndarray:
        """R rows, the coefficients of the other m − r, and r indices."""
        return ranks * (shape[0] + shape[1] - ranks) + ranks

    def indices(self, shape: Shape, parameters: np.ndarray) -> np.ndarray:
        """One for each pivot row."""
        return parameters[:, 0]

    def store(self, left: Tensor, right: Tensor) -> Encoded:
        """Choose pivot rows."""
        found = pivot(left, right)
        shape = (left.shape[0], right.shape[1])
        others = {"lr_out.weight": found.coefficients, "lr_index": found.index}
        return Encoded(self.name, (len(right),), shape, found.pivots, others)

    def rebuild(self, part: Encoded, dtype: torch.dtype) -> Tensor:
        """Put the rows in their places."""
        inner, index = part.inner.to(dtype), part.others["lr_index"]
        whole = inner.new_empty(part.shape)
        rest = torch.ones(len(whole), dtype=torch.bool)
        rest[index] = False
        whole[index], whole[rest] = inner, part.others["lr_out.weight"].to(dtype) @ inner
        return whole
