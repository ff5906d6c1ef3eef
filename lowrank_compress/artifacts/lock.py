"""One process at a time in a run directory."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from lowrank_compress.artifacts.files import is_regular, make_directory, read_small_text
from lowrank_compress.errors import ArtifactError, LockedError

LOCK = ".lock"
# Who holds the lock; beside it, because the locked file itself cannot be read on every system.
HOLDER = ".lock.pid"


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Hold the exclusive lock of a run directory; the system drops it when the process ends, however it ends.

    Raises
    ------
    LockedError
        Another process holds it.
    ArtifactError
        Something that is no lock is in its place, or the directory cannot be written to.
    """
    make_directory(run)
    for path in (run / LOCK, run / HOLDER):
        if path.is_symlink() or (path.exists() and not is_regular(path)):
            raise ArtifactError(f"{path} is no regular file; expected the lock of a run. Remove it.")
    lock = FileLock(run / LOCK, timeout=0, thread_local=False)
    try:
        lock.acquire()
    except Timeout:
        raise LockedError(
            f"{run} is in use by another process ({_holder(run)}). Wait until it ends, or choose another directory "
            "with --out."
        ) from None
    except OSError as problem:
        raise ArtifactError(
            f"{run} cannot be locked ({problem.strerror}). Choose a directory that can be written."
        ) from None
    try:
        with contextlib.suppress(OSError):
            (run / HOLDER).unlink(missing_ok=True)
            with open(run / HOLDER, "x", encoding="ascii") as file:
                file.write(f"pid {os.getpid()}\n")
        yield
    finally:
        (run / HOLDER).unlink(missing_ok=True)
        lock.release()


def _holder(run: Path) -> str:
    try:
        return read_small_text(run / HOLDER, 100).strip() or "unknown"
    except (OSError, ArtifactError):
        return "unknown"
