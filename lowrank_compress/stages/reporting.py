"""How far a stage is, and what its user should know meanwhile."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Iterator
from typing import Protocol, TypeVar

Item = TypeVar("Item")


class Reporter(Protocol):
    """Where a stage says how far it is."""

    def advance(self, step: str, done: int, total: int) -> None:
        """Say that `done` of `total` pieces of a step are finished."""
        ...

    def warn(self, text: str) -> None:
        """Say something that the user should know but that stops nothing."""
        ...


class Silent:
    """Shows no progress, and hands warnings to Python."""

    def advance(self, step: str, done: int, total: int) -> None:
        """Do nothing."""

    def warn(self, text: str) -> None:
        """Issue a Python warning."""
        warnings.warn(text, stacklevel=2)


def in_parts(items: Iterable[Item], size: int) -> Iterator[tuple[int, list[Item]]]:
    """Yield items by parts of `size`, the last of what is left, each with how many there have been by then."""
    remaining, done = iter(items), 0
    while part := list(itertools.islice(remaining, size)):
        done += len(part)
        yield done, part
