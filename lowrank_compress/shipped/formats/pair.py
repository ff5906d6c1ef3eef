"""The low-rank pair: A·B."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .base import Part


class Pair(Part):
    """Emits A·h; B (rank, in) is in ``lr_in``, A (rows, rank) is ``lr_out``."""

    format = "pair"
    help = "two factors: r(m + n) elements"

    @classmethod
    def elements(cls, m: int, n: int, *parameters: Any) -> Any:
        """r(m + n)."""
        return parameters[0] * (m + n)

    @classmethod
    def encode(cls, product: Any, *parameters: int) -> dict[str, Tensor]:
        """Take the factors as they are."""
        left, right = product.factors(*parameters)
        return {"lr_in.weight": right, "lr_out.weight": left}

    def factors(self) -> dict[str, tuple[int, int]]:
        """A."""
        return {self.outer: (self.rows, self.width)}

    def emit(self, layer: nn.Module, x: Tensor, h: Tensor) -> tuple[Tensor, ...]:
        """A·h."""
        return (getattr(layer, self.outer)(h),)

    def emitted_rows(self, layer: nn.Module, inner: Tensor) -> tuple[Tensor, ...]:
        """A·B."""
        return (layer.get_parameter(f"{self.outer}.weight").to(inner.dtype) @ inner,)

    def grown(self, layer: nn.Module, inner: Tensor, left: Tensor, right: Tensor) -> dict[str, Tensor] | None:
        """A and B stay as they are, beside the new columns and rows."""
        outer = layer.get_parameter(f"{self.outer}.weight").to(inner.dtype)
        return {"lr_in.weight": torch.cat([inner, right]), "lr_out.weight": torch.cat([outer, left], 1)}
