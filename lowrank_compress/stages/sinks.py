"""Where the statistics of blocks go as soon as they are complete."""

from __future__ import annotations

from collections.abc import Collection, Mapping, MutableMapping
from typing import Protocol

from torch import Tensor

from lowrank_compress.artifacts.tensors import BlockFiles


class Sink(Protocol):
    """Takes blocks' statistics as soon as they are complete.

    Attributes
    ----------
    step
        What that is called in a report of progress.
    """

    step: str

    @property
    def at_once(self) -> int:
        """How many blocks it would like to take together."""
        ...

    def finished(self, block: int) -> bool:
        """Whether the block has been taken by this or an earlier process."""
        ...

    def take(self, blocks: Mapping[int, MutableMapping[str, Tensor]]) -> None:
        """Take the statistics of blocks; the mapping of each is the sink's to empty."""
        ...

    def flush(self) -> None:
        """Return when all blocks that were taken are on disk."""
        ...


class FileSink:
    """Keeps statistics in the stage's directory."""

    step, at_once = "keep", 1

    def __init__(self, files: BlockFiles) -> None:
        self.files = files

    def finished(self, block: int) -> bool:
        """Whether the block's file is on disk, whole and of this calibration."""
        return self.files.finished(block)

    def take(self, blocks: Mapping[int, MutableMapping[str, Tensor]]) -> None:
        """Write the blocks' files."""
        for block, means in blocks.items():
            self.files.write(block, means)

    def flush(self) -> None:
        """Do nothing: they are."""


class Keeping:
    """Keeps some statistics of each block, in single precision, before another sink takes them all.

    Parameters
    ----------
    sink
        The other one.
    files
        Where they are kept.
    names
        Which.
    """

    def __init__(self, sink: Sink, files: BlockFiles, names: Collection[str]) -> None:
        self._sink, self._files, self._names = sink, files, names
        self.step = sink.step

    @property
    def at_once(self) -> int:
        """That of the other one."""
        return self._sink.at_once

    def finished(self, block: int) -> bool:
        """Whether the other one has taken the block."""
        return self._sink.finished(block)

    def take(self, blocks: Mapping[int, MutableMapping[str, Tensor]]) -> None:
        """Keep, and hand on."""
        for block, means in blocks.items():
            kept = {key: mean.float() for key, mean in means.items() if key.rsplit("/", 1)[-1] in self._names}
            if kept:
                self._files.write(block, kept)
        self._sink.take(blocks)

    def flush(self) -> None:
        """Return when all that was taken is on disk."""
        self._sink.flush()
