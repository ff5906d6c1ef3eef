"""Write safetensors files one tensor at a time: no more than one of them need be in memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

# What the format calls them, in its own order: what is stored first comes last.
NAMES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.float32: "F32",
    torch.complex64: "C64",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.uint64: "U64",
}
DTYPES = {name: dtype for dtype, name in NAMES.items()}
_ORDER = list(NAMES)


@dataclass(frozen=True)
class Lazy:
    """A tensor that is read when it is needed.

    Attributes
    ----------
    shape, dtype
        Its own.
    read
        Reads it.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @property
    def bytes(self) -> int:
        """How large it is."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def at_hand(tensor: Tensor) -> Lazy:
    """Wrap a tensor that is in memory."""
    return Lazy(tuple(tensor.shape), tensor.dtype, lambda: tensor)


def write_tensors(path: Path, tensors: Mapping[str, Lazy], metadata: Mapping[str, str]) -> None:
    """Write the bytes that `safetensors.torch.save_file` writes, tensors being read in the order of the file.

    Raises
    ------
    ValueError
        A dtype is none that the format knows; or what is read is not what was announced.
    """
    order = sorted(tensors, key=lambda name: (-_ORDER.index(tensors[name].dtype), name))
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    start = 0
    for name in order:
        lazy = tensors[name]
        stop = start + lazy.bytes
        entries[name] = {"dtype": NAMES[lazy.dtype], "shape": list(lazy.shape), "data_offsets": [start, stop]}
        start = stop
    header = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for name in order:
            tensor = tensors[name].read().detach().cpu().contiguous()
            if (tuple(tensor.shape), tensor.dtype) != (tensors[name].shape, tensors[name].dtype):
                raise ValueError(f"{name} is {tuple(tensor.shape)} of {tensor.dtype}, announced was {tensors[name]}")
            if tensor.numel():
                file.write(tensor.flatten().view(torch.uint8).numpy().data)
