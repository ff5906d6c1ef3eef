"""What a run costs: seconds by step, and the peak of memory with the step that reached it."""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch

from lowrank_compress.stages.reporting import Reporter


class Meter:
    """A reporter that hands everything on and measures meanwhile.

    The time between two reports, and any rise of the peak in it, belong to the step of the later one.

    Parameters
    ----------
    reporter
        Who is told.

    Attributes
    ----------
    seconds
        Step -> wall-clock seconds.
    peak_step
        The step in which the resident memory was largest; "start" if it has not risen since.
    """

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter
        self._since = time.perf_counter()
        self._start = self._peak = peak_memory()
        self.seconds: dict[str, float] = {}
        self.peak_step = "start"

    def advance(self, step: str, done: int, total: int) -> None:
        """Measure, and hand on."""
        now, peak = time.perf_counter(), peak_memory()
        self.seconds[step] = self.seconds.get(step, 0.0) + now - self._since
        self._since = now
        if peak > self._peak:
            self._peak, self.peak_step = peak, step
        self._reporter.advance(step, done, total)

    def warn(self, text: str) -> None:
        """Hand on."""
        self._reporter.warn(text)

    def cost(self) -> dict[str, Any]:
        """Return what was measured so far: ``seconds`` by step, ``peak_bytes``, ``peak_step``, ``start_bytes``.

        Bytes are of resident memory; of a GPU, ``peak_device_bytes`` of its own.
        """
        found: dict[str, Any] = {
            "seconds": {step: round(seconds, 3) for step, seconds in self.seconds.items()},
            "peak_bytes": max(peak_memory(), self._peak),
            "peak_step": self.peak_step,
            "start_bytes": self._start,
        }
        if torch.cuda.is_available():
            found["peak_device_bytes"] = torch.cuda.max_memory_allocated()
        return found


def peak_memory() -> int:
    """Return the most bytes that have been resident in this process."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        # In bytes on macOS; elsewhere in kilobytes, and never below the peak of the process that started this one.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
