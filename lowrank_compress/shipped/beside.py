"""What a packed layer has beside its codes: a product, precise columns, scales and a rounding of what enters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

MOST_ACTIVATION_BITS = 8


class Beside(NamedTuple):
    """What a packed layer (m, n) has beside its codes Q: y = Q q(x_R / λ) + A B x + W_O x_O.

    O are the outlier columns, R all others; codes of O are those of zeros.

    Attributes
    ----------
    rank : int
        Of A B: ``weight_outer`` (m, r) and ``weight_inner`` (r, n); 0 for none.
    outliers : int
        How many columns are kept as they were: ``weight_outliers`` (m, k), and which, ``weight_columns`` int32 (k,).
    smooth : bool
        Whether what meets the codes is divided by λ, ``weight_smooth`` (n,), which the codes were multiplied by.
    activation_bits : int
        To which what meets the codes is rounded, token by token (see `rounded_activations`); 0: not at all.
    """

    rank: int = 0
    outliers: int = 0
    smooth: bool = False
    activation_bits: int = 0

    @property
    def entry(self) -> dict[str, Any]:
        """What the config says of it: all that is not as usual."""
        return {name: value for name, value in self._asdict().items() if value != self._field_defaults[name]}

    def buffers(self, m: int, n: int, dtype: torch.dtype | None) -> dict[str, tuple[tuple[int, ...], Any]]:
        """Name the tensors of a layer, with their shapes and dtypes."""
        found: dict[str, tuple[tuple[int, ...], Any]] = {}
        if self.rank:
            found |= {"weight_outer": ((m, self.rank), dtype), "weight_inner": ((self.rank, n), dtype)}
        if self.outliers:
            found |= {"weight_outliers": ((m, self.outliers), dtype), "weight_columns": ((self.outliers,), torch.int32)}
        return found | ({"weight_smooth": ((n,), dtype)} if self.smooth else {})

    def added(self, layer: Any, weight: Tensor) -> Tensor:
        """Make of the weight that the codes stand for (m, n) that of the layer, without its rounding of activations."""
        weight = weight / layer.weight_smooth if self.smooth else weight
        if self.outliers:
            weight = weight.index_copy(1, layer.weight_columns.long(), layer.weight_outliers.to(weight.dtype))
        return weight + layer.weight_outer @ layer.weight_inner if self.rank else weight

    def entering(self, layer: Any, x: Tensor) -> Tensor:
        """Make of what enters the layer (..., n) what meets the codes."""
        x = x / layer.weight_smooth.to(x.dtype) if self.smooth else x
        x = x.index_fill(-1, layer.weight_columns.long(), 0) if self.outliers else x
        return rounded_activations(x, self.activation_bits, layer.group) if self.activation_bits else x

    def emitted(self, layer: Any, x: Tensor, y: Tensor) -> Tensor:
        """Add to what the codes make of it (..., m) what all else does."""
        linear = nn.functional.linear
        if self.rank:
            y = y + linear(linear(x, layer.weight_inner.to(x.dtype)), layer.weight_outer.to(x.dtype))
        if self.outliers:
            y = y + linear(x.index_select(-1, layer.weight_columns.long()), layer.weight_outliers.to(x.dtype))
        return y


def rounded_activations(x: Tensor, bits: int, group: int) -> Tensor:
    """Round (..., n) to whole multiples of a scale that each group of each token has: the largest becomes 2ᵇ⁻¹ − 1.

    Gradients pass as if nothing were rounded.
    """
    high = (1 << (bits - 1)) - 1
    grouped = x.detach().to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, group))
    scale = (grouped.abs().amax(-1, keepdim=True) / high).clamp_min(torch.finfo(torch.float32).tiny)
    made = ((grouped / scale).round() * scale).flatten(-2).to(x.dtype)
    return x + (made - x.detach()) if x.requires_grad else made


def checked_beside(path: str, found: Any) -> dict[str, Any]:
    """Copy what a config says that a packed layer has beside its codes.

    Raises
    ------
    ValueError
        It is nothing that this code knows.
    """
    known = Beside._field_defaults
    if not isinstance(found, Mapping) or not found or not set(found) <= set(known):
        raise ValueError(f"factor_quantization.linears[{path!r}]: expected some of {', '.join(known)}, got {found!r}")
    for name, value in found.items():
        if type(value) is not type(known[name]) or value < 0:
            raise ValueError(f"factor_quantization.linears[{path!r}]: {name} cannot be {value!r}")
    if found.get("activation_bits", 2) not in range(2, MOST_ACTIVATION_BITS + 1):
        raise ValueError(
            f"factor_quantization.linears[{path!r}]: expected activations of 2 to {MOST_ACTIVATION_BITS} bits, got "
            f"{found['activation_bits']}"
        )
    return dict(found)
