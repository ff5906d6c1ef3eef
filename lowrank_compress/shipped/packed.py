"""A linear layer whose weights are whole numbers of a few bits, packed into words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .beside import Beside, checked_beside
from .formats.base import require_distinct

WORD = 32
# The layout of tensors: that of compressed-tensors' format of the same name.
LAYOUT = "pack-quantized"


def words_for(count: int, bits: int) -> int:
    """Count the words that hold so many whole numbers of so many bits, one behind the other without gaps."""
    return -(-count * bits // WORD)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack whole numbers (rows, count) from −2ᵇ⁻¹ up, int32 (rows, words): number i begins at bit i·b of its row."""
    rows, count = codes.shape
    values = codes.to(torch.int64) + (1 << (bits - 1))
    start = torch.arange(count, device=codes.device) * bits
    word, shift = start // WORD, start % WORD
    # Of one more word than there are, so that what goes over the end of a word has a place.
    packed = values.new_zeros(rows, words_for(count, bits) + 1)
    packed.index_add_(1, word, (values << shift) & 0xFFFFFFFF)
    packed.index_add_(1, word + 1, values >> (WORD - shift))
    signed = ((packed ^ 0x80000000) - 0x80000000)[:, :-1]
    return signed.to(torch.int32).contiguous()


def unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """Unpack what `pack` has packed: int32 (rows, count)."""
    middle = 1 << (bits - 1)
    if bits in (4, 8):  # none goes over the end of a byte
        # Flat first: a tensor of one column may have any stride along it.
        held = words.flatten().view(torch.uint8).view(len(words), -1)
        if bits == 4:
            held = torch.stack([held & 15, held >> 4], -1).flatten(1)
        return held[:, :count].to(torch.int32) - middle
    start = torch.arange(count, device=words.device) * bits
    word, shift = start // WORD, start % WORD
    room = (WORD - shift).clamp(max=bits)
    below = (words[:, word] >> shift) & ((1 << room) - 1)
    following = words[:, (word + 1).clamp(max=words.shape[1] - 1)]
    above = (following & ((1 << (bits - room)) - 1)) << room
    return (below | above).to(torch.int32) - middle


class PackedLinear(nn.Module):
    """A linear layer with the weight s (c − z), c of a few bits each, s and z one for each group of a row's columns.

    The codes stay packed in memory and are unpacked at every call; ``dequantize`` of the model makes dense layers.

    Parameters
    ----------
    in_features, out_features : int
        n and m of the weight (m, n).
    bias : bool
        Whether it adds a ``bias`` (m,).
    bits, group : int
        Bits of a code, and columns of a group.
    symmetric : bool
        Whether z is 0.
    beside : Beside
        What it computes with beside the codes; then s (c − z) is not all of the weight.

    Notes
    -----
    Tensors are named and laid out as compressed-tensors has them: ``weight_packed`` int32 (m, words), ``weight_scale``
    (m, n / group), ``weight_shape`` int64 (2,), and, if not symmetric, ``weight_zero_point`` int32 (words, n / group),
    packed along the rows.
    """

    weight_packed: Tensor
    weight_scale: Tensor
    weight_shape: Tensor
    weight_zero_point: Tensor
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        bits: int,
        group: int,
        symmetric: bool,
        beside: Beside = Beside(),
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        device = torch.get_default_device() if device is None else torch.device(device)
        self.in_features, self.out_features, self.beside = in_features, out_features, beside
        self.bits, self.group, self.symmetric = bits, group, symmetric
        groups = in_features // group

        def zeros(*shape: int, kind: torch.dtype | None = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=kind, device=device)

        self.register_buffer("weight_packed", zeros(out_features, words_for(in_features, bits)))
        self.register_buffer("weight_scale", zeros(out_features, groups, kind=dtype))
        self.register_buffer("weight_shape", torch.tensor([out_features, in_features], device=device))
        if not symmetric:
            self.register_buffer("weight_zero_point", zeros(words_for(out_features, bits), groups))
        for name, (shape, kind) in beside.buffers(out_features, in_features, dtype).items():
            self.register_buffer(name, zeros(*shape, kind=kind))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None

    def dense(self) -> Tensor:
        """Return the weight (m, n) that it stands for, in the dtype of the scales."""
        return self.beside.added(self, self._decoded())

    def _decoded(self) -> Tensor:
        """Return s (c − z)."""
        codes = unpack(self.weight_packed, self.bits, self.in_features).unflatten(1, (-1, self.group))
        scale = self.weight_scale[..., None]
        values = codes.to(scale.dtype)
        if not self.symmetric:
            zero = unpack(self.weight_zero_point.mT.contiguous(), self.bits, self.out_features).mT
            values = values - zero[..., None].to(scale.dtype)
        return (values * scale).flatten(1)

    @property
    def weight(self) -> nn.Parameter:
        """The same as a parameter, as callers of ``get_parameter`` want it; made anew at every call."""
        return nn.Parameter(self.dense(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        met = self.beside.entering(self, x)
        return self.beside.emitted(self, x, nn.functional.linear(met, self._decoded().to(x.dtype), self.bias))

    def check(self, path: str) -> None:
        """Make sure that outlier columns are columns, each once.

        Raises
        ------
        ValueError
            They are not.
        """
        if self.beside.outliers:
            require_distinct(f"{path}.weight_columns", self.get_buffer("weight_columns"), self.in_features)

    def extra_repr(self) -> str:
        """Shape and grid, as ``print(model)`` shows them."""
        kind = "symmetric" if self.symmetric else "asymmetric"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"bits={self.bits}, group={self.group}, {kind}"
            + "".join(f", {name}={value}" for name, value in self.beside.entry.items())
        )


def checked_packing(found: Any) -> dict[str, Any] | None:
    """Copy ``factor_quantization`` of a config, if it is one that this code can load.

    Raises
    ------
    ValueError
        It is not.
    """
    if found is None:
        return None
    if not isinstance(found, Mapping) or set(found) != {"layout", "linears"}:
        raise ValueError(f"factor_quantization: expected the keys layout and linears, got {found!r:.100}")
    if found["layout"] != LAYOUT:
        raise ValueError(
            f"factor_quantization has the layout {found['layout']!r}, unknown to this code (it reads {LAYOUT}): update "
            "lowrank_compress"
        )
    linears = {}
    for path, entry in found["linears"].items():
        if not isinstance(entry, list | tuple) or len(entry) not in (3, 4):
            raise ValueError(
                f"factor_quantization.linears[{path!r}]: expected bits, group and symmetry, got {entry!r:.100}"
            )
        bits, group, symmetric, *beside = entry
        if type(bits) is not int or not 2 <= bits <= 8 or type(group) is not int or group < 1:
            raise ValueError(f"factor_quantization.linears[{path!r}]: expected 2 to 8 bits and a group, got {entry}")
        if type(symmetric) is not bool:
            raise ValueError(f"factor_quantization.linears[{path!r}]: expected symmetric or not, got {entry}")
        linears[path] = [bits, group, symmetric, *(checked_beside(path, each) for each in beside)]
    return {"layout": LAYOUT, "linears": linears}


def packed_like(path: str, old: Any, entry: Sequence[Any]) -> PackedLinear:
    """Make the packed layer of a linear one, on its device and in its dtype; `entry` is that of the config.

    Raises
    ------
    ValueError
        It is no ``nn.Linear``, or the group does not divide its columns.
    """
    bits, group, symmetric, *more = entry
    beside = Beside(**more[0]) if more else Beside()
    if not isinstance(old, nn.Linear):
        raise ValueError(f"{path} of the low-rank config is a {type(old).__name__}, expected nn.Linear")
    if old.in_features % group:
        raise ValueError(f"{path} has {old.in_features} columns, which groups of {group} do not divide")
    if beside.outliers > old.in_features or beside.rank > min(old.weight.shape):
        raise ValueError(f"{path} is {tuple(old.weight.shape)}, too small for {beside.entry}")
    new = PackedLinear(
        old.in_features,
        old.out_features,
        old.bias is not None,
        bits,
        group,
        symmetric,
        beside,
        device=old.weight.device,
        dtype=old.weight.dtype,
    )
    if hasattr(old, "lr_stock"):
        new.lr_stock = old.lr_stock
    return new.train(old.training)
