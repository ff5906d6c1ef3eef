"""Keys or values that an attention rebuilds from what its cache keeps: nothing of them is stored in the layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from .base import Part


class Rebuilt(Part):
    """Emits zeros: the attention, which has the factors, adds what it rebuilds (see `LatentAttention`).

    So a layer of it emits its bias.
    """

    format = "latent"
    help = "nothing: the attention rebuilds keys and values from what its cache keeps"
    parameters = ()
    keys = ()
    since = 7

    @classmethod
    def inner_rows(cls, entry: Mapping[str, Any]) -> int:
        """None."""
        return 0

    @classmethod
    def problem(cls, entry: Mapping[str, Any]) -> str:
        """Any number of rows will do."""
        return ""

    @classmethod
    def elements(cls, m: int, n: int, *parameters: Any) -> Any:
        """None."""
        return 0

    def emit(self, layer: nn.Module, x: Tensor, h: Tensor) -> tuple[Tensor, ...]:
        """Zeros."""
        return (h.new_zeros(*h.shape[:-1], self.rows),)

    def emitted_rows(self, layer: nn.Module, inner: Tensor) -> tuple[Tensor, ...]:
        """Zeros."""
        return (inner.new_zeros(self.rows, inner.shape[1]),)
