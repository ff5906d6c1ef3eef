"""The compressed linear layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .formats.table import FORMATS


class Stock(NamedTuple):
    """The module of the uncompressed model in whose place a smaller one stands: what a dense export restores.

    The inputs were cut at the end of each of `groups` equal groups (the heads, for an attention's output), the outputs
    at the end of each of `parts` equal parts (two, where a weight holds an MLP's gate and up).
    """

    out_features: int
    in_features: int
    bias: bool
    conv1d: bool
    groups: int = 1
    parts: int = 1


class CompressedLinear(nn.Module):
    """A linear layer whose parts (one, or the fused ones) are each stored in some format (see `Part`).

    All parts share one product ``h = lr_in(x)``, cut into their widths. Each emits its columns; these are joined, and
    put in order where a format emits them in another. The layer equals, up to rounding, a linear layer with
    ``dense_weight()``.

    Parameters
    ----------
    in_features, out_features : int
        n and m of the weight (m, n) it stands for.
    bias : bool
        Whether it adds a ``bias`` (m,).
    parts : sequence of mapping
        ``{"rows": m_i, "format": name, ...}``; what else there is, the format says. With one part the children are
        named ``lr_out`` and ``lr_index``, else ``lr_out_0``, ``lr_index_0``, ...
    heads : int
        1: the parts' rows follow one another. More: every head emits its rows of each part in turn (GPT-NeoX).
    stock : Stock, optional
        The module it replaces, if that is not a ``nn.Linear`` of the same shape and bias.

    Notes
    -----
    Weights start uninitialised: they are always loaded. The empty buffer ``weight`` (0,) makes a load by code that
    does not know this layer fail with a size mismatch instead of starting from random weights.
    """

    weight: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        parts: Sequence[Mapping[str, Any]],
        heads: int = 1,
        stock: Stock | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        device = torch.get_default_device() if device is None else torch.device(device)
        self.in_features, self.out_features, self.heads = in_features, out_features, heads
        self.entries = [dict(part) for part in parts]
        self.parts = [FORMATS[part["format"]](part, "" if len(parts) == 1 else f"_{i}") for i, part in enumerate(parts)]
        self._widths = [part.width for part in self.parts]
        self.stock = stock or Stock(out_features, in_features, bias, False)
        self._ordered = any(part.reorders for part in self.parts) or (heads > 1 and len(parts) > 1)
        self._factorized = not all(part.plain for part in self.parts)
        self._order: Tensor | None = None

        def linear(m: int, n: int) -> nn.Module:
            made: Any = nn.utils.skip_init(nn.Linear, n, max(m, 1), bias=False, device=device, dtype=dtype)
            if m == 0:  # which torch would warn of
                made.out_features, made.weight = 0, nn.Parameter(made.weight.detach()[:0].clone())
            return made

        self.lr_in = linear(sum(self._widths), in_features)
        for part in self.parts:
            for name, shape in part.factors().items():
                self.add_module(name, linear(*shape))
            for name, start in part.buffers(device).items():
                self.register_buffer(name, start)
        self.register_buffer("weight", torch.empty(0, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None

    def row_order(self, device: torch.device) -> Tensor:
        """Return where each output row stands in the concatenation of what the parts emit: int64 (out_features,).

        It is derived from the index buffers when first needed and kept as a plain attribute, because a buffer that is
        not in the checkpoint comes back uninitialised from the meta device.
        """
        order = self._order
        if order is not None and order.device == device:
            return order
        # A tensor made in inference mode could not be used by a later backward pass.
        with torch.inference_mode(False), torch.no_grad():
            emitted, offset = [], 0
            for part in self.parts:
                row, size = part.order(self, device), part.rows // self.heads
                emitted.append(row // size * (self.out_features // self.heads) + offset + row % size)
                offset += size
            order = torch.argsort(torch.cat(emitted))
        if not torch.compiler.is_compiling() and type(order) is Tensor:
            self._order = order
        return order

    def remember_order(self) -> None:
        """Derive the row order now, if one is needed and the indices are in memory.

        A graph compiled before the first call would derive it anew at every call.
        """
        if self._ordered and self.weight.device.type != "meta":
            self.row_order(self.weight.device)

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> CompressedLinear:
        order, self._order = self._order, None
        super()._apply(fn, *args, **kwargs)
        moved = None if order is None else fn(order)
        # What to_empty or a move to the meta device leaves is no order.
        if (
            order is not None
            and type(moved) is Tensor
            and moved.device.type != "meta"
            and order.cpu().equal(moved.cpu())
        ):
            self._order = moved
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._order = None
        super()._load_from_state_dict(*args, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        h = self.lr_in(x)
        if not self._factorized:
            y = h
        else:
            if len(self.parts) == 1:
                emitted = self.parts[0].emit(self, x, h)
            else:
                emitted = []
                for part, own in zip(self.parts, h.split(self._widths, -1), strict=True):
                    emitted += part.emit(self, x, own)
            y = emitted[0] if len(emitted) == 1 else torch.cat(emitted, -1)
        if self._ordered:
            order = self.row_order(y.device)
            # On a CPU, gather with an expanded index is ten times faster than index_select along the last dimension,
            # but for a single token.
            y = y.index_select(-1, order) if y.numel() == len(order) else y.gather(-1, order.expand(y.shape))
        return y if self.bias is None else y + self.bias

    @torch.no_grad()
    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the weight (out_features, in_features) this layer stands for, multiplied in at least float32.

        Half-precision factors are multiplied in float32, others in float64 (float32 on devices without it); the product
        is cast once to `dtype`, by default that of the factors.
        """
        factor = self.lr_in.get_parameter("weight")
        half = factor.dtype.itemsize < 4 or factor.device.type == "mps"
        inner = factor.to(torch.float32 if half else torch.float64).split(self._widths)
        pieces = [part.emitted_rows(self, own) for part, own in zip(self.parts, inner, strict=True)]
        weight = torch.cat([piece for one in pieces for piece in one])
        if self._ordered:
            weight = weight[self.row_order(weight.device)]
        return weight.to(dtype or factor.dtype)

    @property
    def entry(self) -> dict[str, Any]:
        """Its entry of the config, which it can be built from."""
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "bias": self.bias is not None,
            "heads": self.heads,
            "parts": [dict(part) for part in self.entries],
        }

    def extra_repr(self) -> str:
        """Shape and parts, as ``print(model)`` shows them."""
        parts = ", ".join(f"{part.rows}:{part.format}:{part.width}" for part in self.parts)
        bias = self.bias is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}, parts={parts}"
