"""Work that is done while the caller goes on, such as writing what is finished."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class Behind:
    """Does pieces of work behind the caller, one at a time and in the order in which they were handed over."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._handed: list[Future[None]] = []

    def do(self, work: Callable[[], None]) -> None:
        """Hand work over; what comes of it, `flush` tells. What it reads must not change until then."""
        self._handed.append(self._thread.submit(work))

    def flush(self) -> None:
        """Return when all that was handed over is done; raise what the first that failed has raised, once."""
        handed, self._handed = self._handed, []
        for work in handed:
            work.result()
