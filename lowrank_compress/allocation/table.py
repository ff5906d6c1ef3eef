"""The table of allocators."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from lowrank_compress.allocation import loss, uniform, welore
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
    help
        One line for ``lrc list``.
    """

    name: str
    allocate: Callable[..., np.ndarray]
    needs_spectrum: bool
    needs_loss: bool
    help: str


_OWN = (
    Allocator("uniform", uniform.allocate, False, False, "the same kept share for every matrix"),
    Allocator("loss", loss.allocate, False, True, "the least predicted loss under the budget, over all matrices"),
    Allocator("welore", welore.allocate, True, False, "one threshold on normalised singular values (WeLore)"),
)

ALLOCATORS: Registry[Allocator] = Registry(
    "allocator",
    "lowrank_compress.allocators",
    {allocator.name: allocator for allocator in _OWN},
    Allocator,
)
