"""All storage formats of matrices by name."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lowrank_compress.allocation.choice import Choices
from lowrank_compress.formats import dense
from lowrank_compress.formats.best import Best
from lowrank_compress.formats.pair import Pair
from lowrank_compress.formats.pivot import Pivot
from lowrank_compress.formats.spec import Encoded, Format, Shape
from lowrank_compress.registry import Registry

_PAIR, _PIVOT = Pair(), Pivot()
_OWN: tuple[Format, ...] = (
    _PAIR,
    _PIVOT,
    Best("auto", "for each matrix the one of pair and pivot that loses less at the same cost", _PIVOT, _PAIR),
)

FORMATS: Registry[Format] = Registry(
    "storage", "lowrank_compress.formats", {format.name: format for format in _OWN}, Format
)


def choices_of(format: Format, shape: Shape, multiple: int = 1) -> Choices:
    """List what may be chosen of a format that stores less than the dense matrix, cheapest first."""
    grid = format.grid(shape, multiple)
    stored = format.cost(shape, grid)
    paying = stored < shape[0] * shape[1]
    grid = grid[paying]
    return Choices(format.name, grid, stored[paying], format.indices(shape, grid))


def cost_of(format: Format, shape: Shape, parameters: tuple[int, ...]) -> tuple[int, int]:
    """Return the stored elements of one choice, and how many of them are indices."""
    asked = np.array([parameters], dtype=np.int64)
    return int(format.cost(shape, asked)[0]), int(format.indices(shape, asked)[0])


def rebuild(part: Encoded, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return the matrix (out, in) that an encoded one stands for, computed in a dtype."""
    return dense.rebuild(part, dtype) if part.format == "dense" else FORMATS[part.format].rebuild(part, dtype)
