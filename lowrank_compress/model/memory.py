"""How much memory is free, and what the process's heap does with what is freed. Nothing of it changes a result.

The first touch of a fresh page costs many times what filling it costs. To map each tensor anew, and give it back when
it is freed, takes less memory and about a fifth more time than to keep what is freed for the next tensor. What is kept
falls into pieces, between which the large matrices of a decomposition find no room.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

# Parameters of glibc's mallopt, and from which size on it maps tensors by themselves.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGE, _HUGE, _NEVER = 1 << 20, 1 << 30, (1 << 31) - 1


def free_memory() -> int:
    """Bytes of physical memory that are free to use now."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


class Heap:
    """Whether glibc's heap keeps what is freed; where there is no glibc, nothing happens."""

    def __init__(self) -> None:
        self._libc: ctypes.CDLL | None = None
        with contextlib.suppress(OSError):
            self._libc = ctypes.CDLL("libc.so.6")
        self._keeps = False

    def keep(self) -> None:
        """Keep freed memory for the next tensors."""
        self._keeps = True
        self._set(_TRIM_THRESHOLD, _NEVER)
        self._set(_MMAP_THRESHOLD, _HUGE)

    def give_back(self) -> None:
        """Give back what is freed, at once for every tensor of a megabyte and more, and what was kept so far."""
        self._keeps = False
        self._set(_MMAP_THRESHOLD, _LARGE)
        if self._libc is not None and hasattr(self._libc, "malloc_trim"):
            self._libc.malloc_trim(0)

    @contextlib.contextmanager
    def giving_back(self) -> Iterator[None]:
        """Give back what is freed meanwhile, if it is kept otherwise, so that large matrices do not tear it apart."""
        if not self._keeps:
            yield
            return
        self.give_back()
        try:
            yield
        finally:
            self.keep()

    def _set(self, parameter: int, value: int) -> None:
        if self._libc is not None and hasattr(self._libc, "mallopt"):
            self._libc.mallopt(parameter, value)


HEAP = Heap()
"""The process's own. Only a program changes it, never a library on its own account."""
