"""What a run costs: seconds by step, and the peak of memory with the step that reached it."""

from __future__ import annotations

import logging
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch

log = logging.getLogger(__name__)


class Listener(Protocol):
    """Who is told how far a run is."""

    def advance(self, step: str, done: int, total: int) -> None:
        """Hear that `done` of `total` pieces of a step are finished."""
        ...

    def warn(self, text: str) -> None:
        """Hear a warning."""
        ...


def peak_memory() -> int:
    """Return the most bytes that have been resident in this process."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        # In bytes on macOS; elsewhere in kilobytes, and never below the peak of the process that started this one.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Meter:
    """A listener that hands everything on and measures meanwhile.

    The time between two reports, and any rise of the peak in it, belong to the step of the later one.

    Parameters
    ----------
    listener
        Who is told.
    peak
        Finds the most bytes that have been resident.

    Attributes
    ----------
    seconds
        Step -> wall-clock seconds.
    peak_step
        The step in which the resident memory was largest; "start" if it has not risen since.
    """

    def __init__(self, listener: Listener, peak: Callable[[], int] = peak_memory) -> None:
        self._listener = listener
        self._measured = peak
        self._since = time.perf_counter()
        self._start = self._peak = self._measured()
        self.seconds: dict[str, float] = {}
        self.peak_step = "start"

    def advance(self, step: str, done: int, total: int) -> None:
        """Measure, and hand on."""
        now, peak = time.perf_counter(), self._measured()
        self.seconds[step] = self.seconds.get(step, 0.0) + now - self._since
        self._since = now
        if peak > self._peak:
            self._peak, self.peak_step = peak, step
        log.debug("%s: %d of %d, peak of memory %.1f MB", step, done, total, peak / 1e6)
        if done == total:
            log.info("%s took %.3g s", step, self.seconds[step])
        self._listener.advance(step, done, total)

    def warn(self, text: str) -> None:
        """Hand on."""
        self._listener.warn(text)

    def cost(self) -> dict[str, Any]:
        """Return what was measured so far: ``seconds`` by step, ``peak_bytes``, ``peak_step``, ``start_bytes``.

        Bytes are of resident memory; of a GPU, ``peak_device_bytes`` of its own.
        """
        found: dict[str, Any] = {
            "seconds": {step: round(seconds, 3) for step, seconds in self.seconds.items()},
            "peak_bytes": max(self._measured(), self._peak),
            "peak_step": self.peak_step,
            "start_bytes": self._start,
        }
        if torch.cuda.is_available():
            found["peak_device_bytes"] = torch.cuda.max_memory_allocated()
        return found
