"""The low-rank pair with its scale apart: A·S·B, A and B with orthonormal columns and rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .base import Part


class Core(Part):
    """Emits A·S·h; B (rank, in) is in ``lr_in``, S (rank, rank) is ``lr_core``, A (rows, rank) is ``lr_out``.

    It stands for the same matrix as a pair and costs r² more. What it is for: S alone may be trained, r² numbers, while
    A and B stay as they are (LoRA-XS, 2024).
    """

    format = "svd-core"
    help = "two orthonormal factors and a core between them, to be trained alone: r(m + n) + r² elements"
    since = 3

    @classmethod
    def elements(cls, m: int, n: int, *parameters: Any) -> Any:
        """r(m + n + r)."""
        return parameters[0] * (m + n + parameters[0])

    @classmethod
    def encode(cls, product: Any, *parameters: int) -> dict[str, Tensor]:
        """Take the factors' orthonormal bases out of them."""
        return cls.orthonormal(*product.factors(*parameters))

    @staticmethod
    def orthonormal(left: Tensor, right: Tensor) -> dict[str, Tensor]:
        """Name the bases and the core of a product."""
        (outer, above), (inner, below) = torch.linalg.qr(left), torch.linalg.qr(right.mT)
        return {"lr_in.weight": inner.mT.contiguous(), "lr_core.weight": above @ below.mT, "lr_out.weight": outer}

    @property
    def core(self) -> str:
        """Name of the linear layer that is S."""
        return f"lr_core{self.suffix}"

    def factors(self) -> dict[str, tuple[int, int]]:
        """S and A."""
        return {self.core: (self.width, self.width), self.outer: (self.rows, self.width)}

    def emit(self, layer: nn.Module, x: Tensor, h: Tensor) -> tuple[Tensor, ...]:
        """A·S·h."""
        return (getattr(layer, self.outer)(getattr(layer, self.core)(h)),)

    def emitted_rows(self, layer: nn.Module, inner: Tensor) -> tuple[Tensor, ...]:
        """A·S·B."""
        core, outer = (layer.get_parameter(f"{name}.weight").to(inner.dtype) for name in (self.core, self.outer))
        return (outer @ (core @ inner),)

    def grown(self, layer: nn.Module, inner: Tensor, left: Tensor, right: Tensor) -> dict[str, Tensor] | None:
        """Find new bases, of the old ones and what is new together."""
        core, outer = (layer.get_parameter(f"{name}.weight").to(inner.dtype) for name in (self.core, self.outer))
        return self.orthonormal(torch.cat([outer @ core, left], 1), torch.cat([inner, right]))
