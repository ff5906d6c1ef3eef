"""The table of allocators."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from lowrank_compress.allocation import block_influence, equal, loss, uniform, welore
from lowrank_compress.allocation.curve import least_stored
from lowrank_compress.options import CAP, FLOOR, TEMPERATURE, Option
from lowrank_compress.registry import Registry


@dataclass(frozen=True)
class Allocator:
    """A way to choose one point of each curve.

    Parameters
    ----------
    name
        What the user asks for.
    allocate
        ``allocate(curves, limit, **options)`` returns (len(curves),) int64, the index of the chosen point of each
        curve: deterministic, and never more than ``limit`` stored elements in all.
    needs_spectrum
        Whether curves must carry the singular values of the weights.
    needs_loss
        Whether curves must carry losses up to every rank that pays, in one unit for all matrices.
    needs_influence
        Whether curves must carry the influence of their block, which takes calibration data.
    options
        The keyword options of ``allocate``, where all have defaults; users give them by ``--option NAME=VALUE``.
    help
        One line for ``lrc list``.
    least
        ``least(curves, **options)`` returns the smallest limit that `allocate` accepts, from what the curves store
        alone; any such limit is one that it accepts.
    alike
        Whether it makes all blocks alike, so that nothing else may tell them apart.
    measures
        Whether it chooses once more, by losses that are measured at what it has chosen first.
    """

    name: str
    allocate: Callable[..., np.ndarray]
    needs_spectrum: bool
    needs_loss: bool
    needs_influence: bool
    options: tuple[Option, ...]
    help: str
    least: Callable[..., int] = least_stored
    alike: bool = False
    measures: bool = False

    @property
    def needs_data(self) -> bool:
        """Whether it looks at what blocks do on a text, whatever the method."""
        return self.needs_influence or self.measures


_OWN = (
    Allocator(
        name="uniform",
        allocate=uniform.allocate,
        needs_spectrum=False,
        needs_loss=False,
        needs_influence=False,
        options=(),
        help="the same kept share for every matrix",
    ),
    Allocator(
        name="loss",
        allocate=loss.allocate,
        needs_spectrum=False,
        needs_loss=True,
        needs_influence=False,
        options=(FLOOR,),
        help="the least predicted loss under the budget, over all matrices",
    ),
    Allocator(
        name="measured",
        allocate=loss.allocate,
        needs_spectrum=False,
        needs_loss=True,
        needs_influence=False,
        options=(FLOOR,),
        help="as loss, and then once more by losses that are measured, matrix by matrix; takes long",
        measures=True,
    ),
    Allocator(
        name="equal-widths",
        allocate=equal.allocate,
        needs_spectrum=False,
        needs_loss=True,
        needs_influence=False,
        options=(),
        help="one width for each kind of module in all blocks, the best under the predicted loss",
        alike=True,
    ),
    Allocator(
        name="welore",
        allocate=welore.allocate,
        needs_spectrum=True,
        needs_loss=False,
        needs_influence=False,
        options=(),
        help="one threshold on normalised singular values (WeLore)",
    ),
    Allocator(
        name="block-influence",
        allocate=block_influence.allocate,
        needs_spectrum=False,
        needs_loss=False,
        needs_influence=True,
        options=(TEMPERATURE, CAP),
        help="more from the blocks that change their input less (MoDeGPT)",
        least=block_influence.least,
    ),
)

ALLOCATORS: Registry[Allocator] = Registry(
    "allocator",
    "lowrank_compress.allocators",
    {allocator.name: allocator for allocator in _OWN},
    Allocator,
)
