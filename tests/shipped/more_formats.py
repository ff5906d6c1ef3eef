"""Two further storage formats, as somebody might add them: one file, and an entry in the table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_compress.shipped.formats.base import INDEX_DTYPE, Part


class Middle(Part):
    """Emits A·S·h; B (rank, in) is in ``lr_in``, S (middle, rank) is ``lr_core``, A (rows, middle) is ``lr_out``."""

    format = "svd-middle"
    keys = ("rank", "middle")
    since = 3

    def __init__(self, entry: Mapping[str, Any], suffix: str) -> None:
        super().__init__(entry, suffix)
        self.middle = int(entry["middle"])

    def factors(self) -> dict[str, tuple[int, int]]:
        """S and A."""
        return {f"lr_core{self.suffix}": (self.middle, self.width), self.outer: (self.rows, self.middle)}

    def emit(self, layer: nn.Module, x: Tensor, h: Tensor) -> tuple[Tensor, ...]:
        """A·S·h."""
        return (getattr(layer, self.outer)(getattr(layer, f"lr_core{self.suffix}")(h)),)

    def emitted_rows(self, layer: nn.Module, inner: Tensor) -> tuple[Tensor, ...]:
        """A·S·B."""
        core, outer = (
            layer.get_parameter(f"{name}.weight").to(inner.dtype) for name in (f"lr_core{self.suffix}", self.outer)
        )
        return (outer @ (core @ inner),)


class Dictionary(Part):
    """Emits D·S·x: each column of S has `used` coefficients, for the atoms that ``lr_index`` names; takes no ``lr_in``.

    D (rows, atoms) is ``lr_out``, the coefficients (used, in) are ``lr_coefficients``.
    """

    format = "dictionary"
    keys = ("atoms", "used", "columns")
    since = 3

    def __init__(self, entry: Mapping[str, Any], suffix: str) -> None:
        super().__init__(entry, suffix)
        self.atoms, self.used, self.columns = (int(entry[key]) for key in self.keys)

    @classmethod
    def inner_rows(cls, entry: Mapping[str, Any]) -> int:
        """None."""
        return 0

    @classmethod
    def problem(cls, entry: Mapping[str, Any]) -> str:
        """No column has more coefficients than there are atoms."""
        fits = 1 <= entry["used"] <= entry["atoms"]
        return "" if fits else f"{entry['atoms']} atoms cannot have {entry['used']} used in a column"

    def factors(self) -> dict[str, tuple[int, int]]:
        """D, and what is not zero in S."""
        return {
            self.outer: (self.rows, self.atoms),
            f"lr_coefficients{self.suffix}": (self.used, self.columns),
        }

    def buffers(self, device: torch.device) -> dict[str, Tensor]:
        """The atoms of each column."""
        first = torch.arange(self.used, dtype=INDEX_DTYPE, device=device)
        return {f"lr_index{self.suffix}": first[:, None].repeat(1, self.columns)}

    def _scattered(self, layer: nn.Module, columns: Tensor) -> Tensor:
        """S·columns, for (…, in)."""
        coefficients = layer.get_parameter(f"lr_coefficients{self.suffix}.weight").to(columns.dtype)
        index = layer.get_buffer(f"lr_index{self.suffix}").long().flatten()
        sums = columns.new_zeros(*columns.shape[:-1], self.atoms)
        return sums.index_add(-1, index, (columns.unsqueeze(-2) * coefficients).flatten(-2))

    def emit(self, layer: nn.Module, x: Tensor, h: Tensor) -> tuple[Tensor, ...]:
        """D·S·x."""
        return (getattr(layer, self.outer)(self._scattered(layer, x)),)

    def emitted_rows(self, layer: nn.Module, inner: Tensor) -> tuple[Tensor, ...]:
        """D·S."""
        unit = torch.eye(self.columns, dtype=inner.dtype, device=inner.device)
        outer = layer.get_parameter(f"{self.outer}.weight").to(inner.dtype)
        return (outer @ self._scattered(layer, unit).T,)

    def check(self, layer: nn.Module, path: str) -> None:
        """Make sure that atoms are named that there are."""
        name = f"lr_index{self.suffix}"
        index = layer.get_buffer(name)
        if index.device.type != "meta" and not bool(((index >= 0) & (index < self.atoms)).all()):
            raise ValueError(f"{path}.{name} names atoms that are not there: it is damaged")
