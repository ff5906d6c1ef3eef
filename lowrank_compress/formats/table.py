"""All storage formats of matrices by name: those that layers compute with, and the best of some of them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lowrank_compress.allocation.choice import Choices
from lowrank_compress.formats.best import Best
from lowrank_compress.formats.spec import Encoded, Format, Shape
from lowrank_compress.formats.stored import Stored
from lowrank_compress.registry import Registry
from lowrank_compress.shipped.formats.table import FORMATS as PARTS

_STORED: dict[str, Format] = {name: Stored(part) for name, part in PARTS.items()}
_AUTO = Best("auto", "of pair and pivot the one that loses less at the same cost", _STORED["pivot"], _STORED["pair"])

# What no one chooses for a single matrix.
_OF_OTHERS = ("dense", "latent")

FORMATS: Registry[Format] = Registry(
    "storage",
    "lowrank_compress.formats",
    {name: format for name, format in _STORED.items() if name not in _OF_OTHERS} | {_AUTO.name: _AUTO},
    Format,
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
    return (_STORED.get(part.format) or FORMATS[part.format]).rebuild(part, dtype)
