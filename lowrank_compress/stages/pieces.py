"""The encoded blocks from which a checkpoint is put together, a large one in several files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import count, takewhile
from pathlib import Path
from typing import Any

from torch import Tensor

from lowrank_compress.artifacts.stream import Lazy
from lowrank_compress.artifacts.tensors import BlockFiles
from lowrank_compress.stages.encode import EncodedBlock

MOST = 100_000


class Pieces:
    """Finished blocks in a folder, and what was finished of the block that is being encoded.

    A block is finished once its last file is written, which has its notes.

    Parameters
    ----------
    directory, id
        As of `BlockFiles`.
    """

    def __init__(self, directory: Path, id: str) -> None:
        self._blocks = BlockFiles(directory, id, "factors")
        self._parts = BlockFiles(directory, id, "part")
        self._count: Counter[int] = Counter()

    def add(self, block: int, tensors: Mapping[str, Tensor]) -> None:
        """Write some tensors of a block; what an interrupted process has left of it is written over."""
        self._parts.write(block * MOST + self._count[block], tensors)
        self._count[block] += 1

    def finish(self, block: int, encoded: EncodedBlock) -> None:
        """Write the others, and what is to be known of the block."""
        self._blocks.write(block, encoded.tensors, encoded.notes() | {"parts": self._count[block]})

    def finished(self, block: int) -> bool:
        """Tell whether a block is on disk as it was written."""
        if not self._blocks.finished(block):
            return False
        return all(self._parts.finished(number) for number in self._numbers(block))

    def notes(self, block: int) -> dict[str, Any]:
        """Read the notes of a finished block."""
        return self._blocks.notes(block)

    def each(self, block: int) -> Iterator[tuple[str, Lazy]]:
        """Give the tensors of a finished block in the order of their names, to be read one by one.

        Raises
        ------
        ArtifactError
            As `BlockFiles.each`.
        """
        found = self._blocks.lazily(block)
        for number in self._numbers(block):
            found |= self._parts.lazily(number)
        yield from sorted(found.items())

    def remove(self, blocks: Iterable[int]) -> None:
        """Remove the files of blocks, and the directory if nothing is left in it."""
        for block in blocks:
            # An interrupted process that had less memory may have left more parts than the finished block has.
            self._parts.remove(takewhile(lambda number: self._parts.path(number).exists(), count(block * MOST)))
            self._blocks.remove([block])

    def _numbers(self, block: int) -> range:
        """Of a finished block."""
        return range(block * MOST, block * MOST + self.notes(block)["parts"])
