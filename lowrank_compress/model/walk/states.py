"""Hidden states between blocks: in memory, or in a file where they would not fit."""

from __future__ import annotations

import os
import tempfile
import weakref
from collections import defaultdict
from collections.abc import Callable
from io import FileIO
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor


class State(Protocol):
    """Hidden states that a store keeps."""

    def load(self) -> Tensor:
        """Return them, (sequences, length, width), on the CPU."""
        ...


class _Held:
    """In memory."""

    def __init__(self, states: Tensor) -> None:
        self._states = states

    def load(self) -> Tensor:
        return self._states


class _Filed:
    """In a file, at an offset; the file is there as long as this is."""

    def __init__(self, file: FileIO, offset: int, like: Tensor) -> None:
        self._file, self._offset = file, offset
        self._shape, self._dtype = like.shape, like.dtype

    def load(self) -> Tensor:
        states = torch.empty(self._shape, dtype=self._dtype)
        _whole(os.preadv, self._file.fileno(), states, self._offset)
        return states


class StateStore:
    """Keeps hidden states on the CPU; where it spills, in a file that vanishes with the store or the process.

    The file is read and written, not mapped: what is spilled takes no memory of the process. The place of states that
    are no longer referred to is used again. Where states lie changes no result.

    Parameters
    ----------
    spill
        Whether to put states on disk.
    directory
        Where, which is made if need be; None for the system's temporary directory.
    """

    def __init__(self, spill: bool = False, directory: Path | None = None) -> None:
        self._spill, self._directory = spill, directory
        self._file: FileIO | None = None  # until something is spilled
        self._end = 0
        self._free: dict[int, list[int]] = defaultdict(list)

    def keep(self, states: Tensor) -> State:
        """Keep (sequences, length, width) states."""
        states = states.detach().cpu()
        if not self._spill:
            return _Held(states)
        if self._file is None:
            self._file = _temporary(self._directory)
        size = states.numel() * states.element_size()
        if self._free[size]:
            offset = self._free[size].pop()
        else:
            offset, self._end = self._end, self._end + size
        _whole(os.pwritev, self._file.fileno(), states.contiguous(), offset)
        kept = _Filed(self._file, offset, states)
        weakref.finalize(kept, self._free[size].append, offset).atexit = False
        return kept


def _temporary(directory: Path | None) -> FileIO:
    """Open a file without a name."""
    if directory is not None:
        directory.mkdir(parents=True, exist_ok=True)
    return tempfile.TemporaryFile(dir=directory, buffering=0)


def _whole(transfer: Callable[..., int], descriptor: int, states: Tensor, offset: int) -> None:
    """Read or write all bytes of contiguous states, in as many calls as it takes."""
    data = states.flatten().view(torch.uint8).numpy().data
    done = 0
    while done < len(data):
        count = transfer(descriptor, [data[done:]], offset + done)
        if count == 0:
            raise OSError(f"A file of hidden states ended after {offset + done} bytes.")
        done += count
