"""The processes of one command, as torchrun starts them: each has a share of the texts, the blocks or the tasks.

The first does what must be done once; all see the same run directory.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Item = TypeVar("Item")
Found = TypeVar("Found")

# Others wait while one works on; torchrun ends them all when one fails.
PATIENCE = timedelta(days=7)


@dataclass(frozen=True)
class Workers:
    """One process among `count`; alone by default.

    Attributes
    ----------
    rank
        Number of this process, from 0.
    count
        How many there are.
    """

    rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this one does what must be done once."""
        return self.rank == 0

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """Return the part of some items that is for this process."""
        return items[self.rank :: self.count]

    def once(self, work: Callable[[], Found]) -> Found:
        """Let the first do something, when all have come here, and tell all its result."""
        if self.count == 1:
            return work()
        dist.barrier()
        found = [work() if self.is_first else None]
        dist.broadcast_object_list(found, src=0, device=torch.device("cpu"))
        return found[0]  # pyright: ignore[reportReturnType]

    def sum(self, tensors: Mapping[str, Tensor], owner: int) -> None:
        """Add up tensors of all processes, in place in the owner's; those of the others are spent."""
        if self.count > 1:
            for name in sorted(tensors):
                dist.reduce(tensors[name], dst=owner)

    def largest(self, tensors: Mapping[str, Tensor], owner: int) -> None:
        """Take the largest of all processes' values, element by element, in place in the owner's tensors."""
        if self.count > 1:
            for name in sorted(tensors):
                dist.reduce(tensors[name], dst=owner, op=dist.ReduceOp.MAX)

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Add up tensors of all processes, in place in each."""
        if self.count > 1:
            whole = torch.cat([tensor.flatten() for tensor in tensors])
            dist.all_reduce(whole)
            for tensor, part in zip(tensors, whole.split([tensor.numel() for tensor in tensors]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def total(self, values: Sequence[float]) -> list[float]:
        """Add up numbers of all processes; all get the sums."""
        if self.count == 1:
            return list(values)
        sums = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(sums)
        return sums.tolist()


def started(environment: Mapping[str, str] = os.environ) -> int:
    """How many processes torchrun has started; 1 outside of it."""
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return int(environment["WORLD_SIZE"]) if all(name in environment for name in names) else 1


@contextmanager
def workers_of(environment: Mapping[str, str] = os.environ) -> Iterator[Workers]:
    """Join the processes that torchrun has started; outside of it, be alone."""
    count = started(environment)
    if count == 1:
        yield Workers()
        return
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(environment["LOCAL_RANK"]) % torch.cuda.device_count())
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=PATIENCE)
    try:
        yield Workers(dist.get_rank(), count)
    finally:
        dist.destroy_process_group()
