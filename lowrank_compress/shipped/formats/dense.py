"""The matrix itself, as one part of a fused layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from .base import Part


class Dense(Part):
    """Emits h: the whole matrix (rows, in) is in ``lr_in``."""

    format = "dense"
    help = "as it is"
    parameters = ()
    plain = True

    @classmethod
    def elements(cls, m: int, n: int, *parameters: Any) -> Any:
        """All."""
        return m * n

    @classmethod
    def describe(cls, m: int, n: int, *parameters: int) -> dict[str, Any]:
        """Its rank is spelled as its rows."""
        return {"rows": m, "format": cls.format, "rank": m}

    @classmethod
    def inner_rows(cls, entry: Mapping[str, Any]) -> int:
        """All of them, whatever the entry's rank says."""
        return int(entry["rows"])

    def emit(self, layer: nn.Module, x: Tensor, h: Tensor) -> tuple[Tensor, ...]:
        """H."""
        return (h,)

    def emitted_rows(self, layer: nn.Module, inner: Tensor) -> tuple[Tensor, ...]:
        """The matrix."""
        return (inner,)
