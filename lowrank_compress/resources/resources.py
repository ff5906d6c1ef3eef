"""The memory, the threads and the other processes of a run, and how much is done together for that."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch

from lowrank_compress.resources.memory import free_memory
from lowrank_compress.resources.threads import in_threads
from lowrank_compress.resources.workers import Workers

Item = TypeVar("Item")
Found = TypeVar("Found")

# What is decomposed together is lost together in a crash.
MOST_BLOCKS = 8
# More would save no time.
MOST_SUMS = 1 << 30


@dataclass(frozen=True)
class Resources:
    """What one process may use. None of it changes a result, so none of it is in the id of one.

    Where a result is computed does change it: that device is in a stage's config, and is here for scheduling alone.

    Attributes
    ----------
    memory
        Bytes to get by with; None for what is free.
    workers
        This process, and how many others share the work and what is free.
    device
        Where the stage computes, as `on` has put it.
    threads
        How many threads there are to compute in; None for as many as torch has.
    """

    memory: int | None = None
    workers: Workers = field(default_factory=Workers)
    device: str = "cpu"
    threads: int | None = None

    def on(self, device: str) -> Resources:
        """Return the same for a stage that computes on a device."""
        return replace(self, device=device)

    def alone(self, device: str) -> Resources:
        """Return the same for a process that works by itself while the others wait."""
        return replace(self, workers=Workers(), device=device)

    @property
    def _on_cpu(self) -> bool:
        return torch.device(self.device).type == "cpu"

    @property
    def budget(self) -> int:
        """Bytes that this process has: those given, or its part of what is free at this moment."""
        return free_memory() // self.workers.count if self.memory is None else self.memory

    @property
    def for_decompositions(self) -> int:
        """Bytes that statistics and decompositions may take."""
        return self.budget // 2

    @property
    def for_states(self) -> int:
        """Bytes that hidden states may take in memory; where they are more, they go to disk."""
        return self.budget // 2

    @property
    def for_experts(self) -> int:
        """Bytes that the weights of a block's experts may take together; where they are more, one is read at a time."""
        return self.budget // 4

    @property
    def for_sums(self) -> int:
        """Bytes that the sums may take of those experts that are fitted anew in one go."""
        return min(MOST_SUMS, self.for_decompositions // 2)

    def blocks_at_once(self, statistics: int) -> int:
        """How many blocks to decompose together, where the statistics of one have so many bytes.

        On a CPU as many as there are threads, so that all have work to the end; but no more than have their statistics
        in half of the memory for decompositions.
        """
        return self._at_once(MOST_BLOCKS, self.for_decompositions // (2 * max(statistics, 1)))

    def items_at_once(self, sizes: Iterable[int]) -> int:
        """How many pieces of work that take so many bytes to do at a time: on a CPU one in each thread, if they fit."""
        return self._at_once(self.for_decompositions // max(max(sizes, default=1), 1))

    def _at_once(self, *limits: int) -> int:
        if not self._on_cpu:
            return 1
        return max(1, min(torch.get_num_threads() if self.threads is None else self.threads, *limits))

    def each(
        self, work: Callable[[Item], Found], items: Sequence[Item], size: Callable[[Item], int]
    ) -> list[tuple[Item, Found]]:
        """Work on items, on a CPU on several at a time and on each in one thread.

        Parameters
        ----------
        work
            As for `in_threads`.
        size
            How many bytes the work on an item takes; what takes more also takes longer.

        Returns
        -------
        list of tuple
            Items and what was found, in any order.
        """
        if not self._on_cpu:
            return [(item, work(item)) for item in items]
        # The longest first, so that none is left to run alone.
        order = sorted(items, key=lambda item: -size(item))
        found = in_threads(work, order, self.items_at_once(map(size, order)))
        return list(zip(order, found, strict=True))

    def may_wait(self, size: int) -> bool:
        """Whether so many bytes may stay in memory until they are written, while work goes on."""
        return 4 * size <= self.for_decompositions

    def may_keep_freed(self, used: int) -> bool:
        """Whether a process that uses so many bytes has so much more that what is freed need not be given back."""
        return 2 * used <= self.budget
