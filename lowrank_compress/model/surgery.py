"""Turn factors into the tensors and the config entry of a compressed module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowrank_compress.arch.resolve import Heads, Target
from lowrank_compress.arch.spec import Role
from lowrank_compress.model.casting import cast
from lowrank_compress.model.layers import INDEX_DTYPE

ROTARY = "lr_rotary"  # the buffer of `layers.CompressedAttention`


@dataclass(frozen=True)
class Encoded:
    """One matrix in a storage format.

    Attributes
    ----------
    format
        "pair", "pivot" or "dense".
    rank
        r; the number of rows for "dense".
    inner
        What goes into the stacked first product: B (r, in), the pivot rows (r, in), or W itself (out, in).
    outer
        A (out, r), the coefficients (out − r, r), or None.
    index
        Pivot rows, (r,) int64 ascending, or None.
    """

    format: str
    rank: int
    inner: Tensor
    outer: Tensor | None = None
    index: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the matrix it stands for."""
        rows = len(self.inner) if self.outer is None else len(self.outer)
        return (rows + (len(self.inner) if self.index is not None else 0), self.inner.shape[1])

    def rebuild(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """The matrix (out, in) that it stands for, computed in a dtype."""
        inner = self.inner.to(dtype)
        if self.outer is None:
            return inner
        rest = self.outer.to(dtype) @ inner
        if self.index is None:
            return rest
        whole = inner.new_empty(len(inner) + len(rest), inner.shape[1])
        others = torch.ones(len(whole), dtype=torch.bool)
        others[self.index] = False
        whole[self.index], whole[others] = inner, rest
        return whole

    def cast(self, dtype: torch.dtype, name: str) -> Encoded:
        """Round to the dtype in which it will be stored; `name` is the matrix's, for the error where that overflows."""
        what = name if self.outer is None else f"A factor of {name}"
        outer = None if self.outer is None else cast(self.outer, dtype, what)
        return Encoded(self.format, self.rank, cast(self.inner, dtype, what), outer, self.index)


def module_entry(targets: Sequence[Target], parts: Sequence[Encoded]) -> dict[str, Any]:
    """Describe a compressed module as `quantization_config.modules` of config.json does."""
    return {
        "in_features": parts[0].shape[1],
        "out_features": sum(part.shape[0] for part in parts),
        "bias": targets[0].has_bias,
        "heads": targets[0].rows.groups,
        "parts": [{"rows": part.shape[0], "format": part.format, "rank": part.rank} for part in parts],
    }


def attention_entry(
    targets: Mapping[Role, Target], heads: Heads, query_key: int, value: int, *, rotary: bool
) -> dict[str, Any]:
    """Describe an attention module with narrower heads as `quantization_config.attention` of config.json does.

    Parameters
    ----------
    targets
        q, k, v and o.
    query_key, value
        The dimensions that heads keep.
    rotary
        Whether the kept dimensions of rotated heads are listed in a buffer.
    """
    return {
        "heads": heads.query,
        "kv_heads": heads.key,
        "size": heads.size,
        "query_key": query_key,
        "value": value,
        "rotary": rotary,
        "interleaved": targets["q"].rows.groups > 1,
        "projections": {role: targets[role].module for role in ("q", "k", "v", "o")},
    }


def joined(targets: Sequence[Target], parts: Sequence[Tensor]) -> Tensor:
    """Put the rows (out_i, …) of a module's parts in the order in which the module has them."""
    groups = targets[0].rows.groups
    return torch.cat([part.unflatten(0, (groups, -1)) for part in parts], 1).flatten(0, 1)


def module_tensors(targets: Sequence[Target], parts: Sequence[Encoded], dtype: torch.dtype) -> dict[str, Tensor]:
    """Name the tensors of a compressed module by their leaf names (see `layers.CompressedLinear`), without the bias."""
    tensors = {
        "lr_in.weight": torch.cat([part.inner for part in parts]).to(dtype),
        "weight": torch.empty(0, dtype=dtype),
    }
    for number, part in enumerate(parts):
        suffix = "" if len(parts) == 1 else f"_{number}"
        if part.outer is not None:
            tensors[f"lr_out{suffix}.weight"] = part.outer.to(dtype)
        if part.index is not None:
            tensors[f"lr_index{suffix}"] = part.index.to(INDEX_DTYPE)
    return tensors
