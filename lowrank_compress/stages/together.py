"""How much is decomposed together, as threads and memory allow. Nothing of it changes a result."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lowrank_compress.methods.units import Unit, statistics_bytes

# What is decomposed together is lost together in a crash.
MOST_BLOCKS = 8


def room(memory: int) -> int:
    """Bytes that decompositions may take of those that a process has; the other half is for hidden states."""
    return memory // 2


def blocks_at_once(units: Sequence[Unit], device: torch.device, memory: int) -> int:
    """How many blocks to decompose together.

    On a CPU as many as there are threads, so that all have work to the end; but no more than have their statistics in
    half of the room.

    Parameters
    ----------
    units
        Of all blocks.
    device
        Where they are decomposed.
    memory
        Bytes that the process has.
    """
    if device.type != "cpu":
        return 1
    waiting = statistics_bytes(unit for unit in units if unit.block == units[0].block)
    return max(1, min(torch.get_num_threads(), MOST_BLOCKS, room(memory) // (2 * max(waiting, 1))))


def matrices_at_once(units: Sequence[Unit], device: torch.device, memory: int) -> int:
    """How many of some matrices to decompose at a time: on a CPU one in each thread, as far as there is room."""
    if device.type != "cpu":
        return 1
    largest = max((unit.working_bytes() for unit in units), default=1)
    return max(1, min(torch.get_num_threads(), room(memory) // largest))
