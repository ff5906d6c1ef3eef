"""The interpolative decomposition: some rows as they are, the others as combinations of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .base import INDEX_DTYPE, Part, require_distinct


class Pivot(Part):
    """Emits h, which are the rows ``lr_index``, and C·h, which are the others, ascending.

    The pivot rows (rank, in) are in ``lr_in``, C (rows − rank, rank) is ``lr_out``. Indices are int32; int64, which
    checkpoints of version 1 have, is taken as well.
    """

    format = "pivot"
    help = "rows of the product itself and coefficients of the others in them: r(m + n - r) + r elements"
    reorders = True

    @classmethod
    def most(cls, entry: Mapping[str, Any]) -> int:
        """One row at least is a combination."""
        return int(entry["rows"]) - 1

    @classmethod
    def elements(cls, m: int, n: int, *parameters: Any) -> Any:
        """R rows, the coefficients of the other m − r, and r indices (PIFA, ICML 2025)."""
        return parameters[0] * (m + n - parameters[0]) + parameters[0]

    @classmethod
    def indices(cls, m: int, n: int, *parameters: Any) -> Any:
        """One for each pivot row."""
        return 1 * parameters[0]

    @classmethod
    def encode(cls, product: Any, *parameters: int) -> dict[str, Tensor]:
        """Choose the pivot rows."""
        index, rows, coefficients = product.interpolated(*parameters)
        return {"lr_in.weight": rows, "lr_out.weight": coefficients, "lr_index": index}

    def factors(self) -> dict[str, tuple[int, int]]:
        """C."""
        return {self.outer: (self.rows - self.width, self.width)}

    def buffers(self, device: torch.device) -> dict[str, Tensor]:
        """Which rows the pivots are, ascending."""
        return {f"lr_index{self.suffix}": torch.arange(self.width, dtype=INDEX_DTYPE, device=device)}

    def emit(self, layer: nn.Module, x: Tensor, h: Tensor) -> tuple[Tensor, ...]:
        """H and C·h."""
        return h, getattr(layer, self.outer)(h)

    def emitted_rows(self, layer: nn.Module, inner: Tensor) -> tuple[Tensor, ...]:
        """The pivot rows, and their combinations."""
        return inner, layer.get_parameter(f"{self.outer}.weight").to(inner.dtype) @ inner

    def grown(self, layer: nn.Module, inner: Tensor, left: Tensor, right: Tensor) -> dict[str, Tensor] | None:
        """The pivots stay pivots; r of the other rows join them, those that elimination with row exchanges picks.

        The rows of the sum are P + L_p R at the pivots and C P + L_o R elsewhere. With S = L_o - C L_p, the others are
        C times the new pivots and S R more, and so are r of these, with S_2: each other row's share of them is
        D = S S_2⁻¹, and C - D C_2 is its share of the old pivots.
        """
        coefficients = layer.get_parameter(f"{self.outer}.weight").to(inner.dtype)
        order = self.order(layer, inner.device)
        width, rank = self.width, left.shape[1]
        pivots, others = order[:width], order[width:]
        lower, exchanges, _ = torch.linalg.lu_factor_ex(left[others] - coefficients @ left[pivots])
        places = list(range(len(others)))
        for place, other in enumerate(exchanges.tolist()):
            places[place], places[other - 1] = places[other - 1], places[place]
        joining, rest = torch.tensor(places, device=inner.device).split([rank, len(places) - rank])
        share = torch.linalg.solve_triangular(lower[:rank], lower[rank:], upper=False, left=False, unitriangular=True)
        rows = torch.cat([inner, coefficients[joining] @ inner])
        index, remaining = torch.cat([pivots, others[joining]]), others[rest]
        rows = rows + left[index] @ right
        mixed = torch.cat([coefficients[rest] - share @ coefficients[joining], share], 1)
        ascending, below = index.argsort(), remaining.argsort()
        return {
            "lr_in.weight": rows[ascending],
            "lr_out.weight": mixed[below][:, ascending],
            "lr_index": index[ascending].to(INDEX_DTYPE),
        }

    def order(self, layer: nn.Module, device: torch.device) -> Tensor:
        """The pivots, and then the others."""
        index = layer.get_buffer(f"lr_index{self.suffix}").to(device, torch.int64)
        others = torch.ones(self.rows, dtype=torch.int64, device=device).scatter(0, index, 0)
        return torch.argsort(others, stable=True)

    def check(self, layer: nn.Module, path: str) -> None:
        """Make sure that the pivots are rows, each once."""
        name = f"lr_index{self.suffix}"
        require_distinct(f"{path}.{name}", layer.get_buffer(name), self.rows)
