"""Hidden states between blocks: in memory, or memory-mapped files where they would not fit."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor


class StateStore:
    """Keeps hidden states on the CPU; where it spills, in files that vanish with the tensors or the process.

    Where states lie changes no result.

    Parameters
    ----------
    spill
        Whether to put states on disk.
    directory
        Where; None for the system's temporary directory.
    """

    def __init__(self, spill: bool = False, directory: Path | None = None) -> None:
        self.spill = spill
        self.directory = directory

    def keep(self, states: Tensor) -> Tensor:
        """Keep (sequences, length, width) states; the result stands for them."""
        states = states.detach()
        if not self.spill:
            return states.cpu()
        with tempfile.NamedTemporaryFile(dir=self.directory, suffix=".states") as file:
            mapped = torch.from_file(file.name, shared=True, size=states.numel(), dtype=states.dtype)
        return mapped.view(states.shape).copy_(states)


def free_memory() -> int:
    """Bytes of physical memory that are free to use now."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
