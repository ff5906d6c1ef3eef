"""How much memory is free, and what the heap of a program does with what is freed. Nothing of it changes a result.

The first touch of a fresh page costs many times what filling it costs. To map each tensor anew, and give it back when
it is freed, takes about a fifth more time than to keep what is freed for the next tensor; but what is kept falls into
pieces, between which larger tensors find no room.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from pathlib import Path

import torch
from pydantic import ByteSize, TypeAdapter, ValidationError

from lowrank_compress.errors import InputError

# Parameters of glibc's mallopt.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
# Holds something while freed memory is kept.
_kept: list[bool] = []


def free_memory() -> int:
    """Bytes of physical memory that are free to use now."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return all_memory(torch.device("cpu")) // 2


def all_memory(device: torch.device) -> int:
    """Bytes of memory that a device has, free or not: the same each time that it is asked."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def bytes_of(size: int | str | None) -> int | None:
    """Read a memory budget such as 8GB or 512MiB.

    Raises
    ------
    InputError
        It is none.
    """
    if size is None:
        return None
    try:
        return int(TypeAdapter(ByteSize).validate_python(size))
    except ValidationError:
        raise InputError(f"--memory-budget {size} is no size; expected a number of bytes, or one like 8GB.") from None


def keep_freed() -> None:
    """Keep freed memory for the next tensors, in this process from now on; for programs, not for libraries."""
    _kept.append(True)
    _set(_TRIM_THRESHOLD, (1 << 31) - 1)
    _set(_MMAP_THRESHOLD, 1 << 30)
    _set(_ARENA_MAX, 1)  # what one thread has freed, others can use


def give_back_freed() -> None:
    """Give memory back when it is freed, for every tensor of a megabyte and more; the opposite of `keep_freed`.

    By itself glibc learns to keep pieces of up to 32 MB.
    """
    _kept.clear()
    _set(_MMAP_THRESHOLD, 1 << 20)


def trim() -> None:
    """Give back what was freed in smaller pieces, too, such as the weights of small experts, unless it is kept."""
    if not _kept:
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)


def _set(parameter: int, value: int) -> None:
    # Other systems have other heaps.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").mallopt(parameter, value)
