"""A quantized matrix as it is stored: its tensors, and their bytes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_compress.linalg.quantize import Grid, Quantized
from lowrank_compress.shipped.beside import Beside
from lowrank_compress.shipped.packed import pack, words_for

_WORD_BYTES, _SHAPE_BYTES = 4, 16
_ROWS = 4096  # that are packed at once
BITS = (2, 3, 4, 5, 6, 8)
"""What a budget chooses from, matrix by matrix."""


@dataclass(frozen=True)
class Packing:
    """How matrices in few bits are stored.

    Attributes
    ----------
    group
        How many columns share a scale; where it is 0 or does not divide a matrix's columns, all of a row do.
    symmetric
        Whether zero points are 0.
    dtype
        Of the scales.
    """

    group: int
    symmetric: bool
    dtype: torch.dtype

    def grid(self, columns: int, bits: int) -> Grid:
        """Return the grid of a matrix with so many columns."""
        group = self.group or columns
        return Grid(bits, group if columns % group == 0 else columns, self.symmetric)

    def bytes(self, shape: tuple[int, int], bits: int) -> int:
        """Count the bytes of a matrix (m, n)."""
        return packed_bytes(shape, self.grid(shape[1], bits), self.dtype)


def scale_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which scales are stored in a checkpoint of a dtype: in two bytes, that it loses nothing of."""
    return torch.float16 if dtype == torch.float16 else torch.bfloat16


def packed_tensors(found: Quantized, dtype: torch.dtype) -> dict[str, Tensor]:
    """Name the tensors of a quantized matrix by their leaf names (see `PackedLinear`).

    Parameters
    ----------
    dtype
        Of the scales, which have such values already.
    """
    grid = found.scales.grid
    tensors = {
        "weight_packed": torch.cat([pack(rows, grid.bits) for rows in found.codes.split(_ROWS)]),
        "weight_scale": found.scales.scale.to(dtype),
        "weight_shape": torch.tensor(found.codes.shape),
    }
    if not grid.symmetric:
        tensors["weight_zero_point"] = pack(found.scales.zero.mT, grid.bits).mT.contiguous()
    return tensors


def packed_bytes(shape: tuple[int, int], grid: Grid, dtype: torch.dtype) -> int:
    """Count the bytes of a quantized matrix (m, n): those of `packed_tensors`."""
    m, n = shape
    groups = n // grid.group
    zeros = 0 if grid.symmetric else words_for(m, grid.bits) * groups * _WORD_BYTES
    return m * words_for(n, grid.bits) * _WORD_BYTES + m * groups * dtype.itemsize + zeros + _SHAPE_BYTES


def beside_bytes(shape: tuple[int, int], beside: Beside, dtype: torch.dtype) -> int:
    """Count the bytes of what a quantized matrix (m, n) has beside its codes, numbers in a dtype."""
    return sum(math.prod(size) * kind.itemsize for size, kind in beside.buffers(*shape, dtype).values())
