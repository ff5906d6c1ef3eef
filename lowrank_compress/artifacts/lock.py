"""One process at a time in a run directory."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lowrank_compress.errors import LockedError

LOCK = ".lock"


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Hold the exclusive lock of a run directory; the kernel drops it when the process ends, however it ends.

    Raises
    ------
    LockedError
        Another process holds it.
    """
    run.mkdir(parents=True, exist_ok=True)
    with open(run / LOCK, "a+") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            handle.seek(0)
            raise LockedError(
                f"{run} is in use by another process ({handle.read().strip() or 'unknown'}). "
                "Wait until it ends, or choose another directory with --out."
            ) from None
        handle.truncate(0)
        handle.write(f"pid {os.getpid()}\n")
        handle.flush()
        yield
