"""One process at a time in a run directory."""

from __future__ import annotations

import contextlib
import os
import re
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
        if os.path.lexists(path) and not _is_lock(path):
            raise ArtifactError(
                f"{path} is not the lock of a run, and is left as it is. Move it, or choose another run."
            )
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


def _is_lock(path: Path) -> bool:
    """Whether a file is a lock, which may be truncated: no link, of one name, with at most a process's number in it."""
    if path.is_symlink() or not is_regular(path) or path.stat().st_nlink != 1:
        return False
    try:
        return re.match(r"(pid )?\d+\n|\Z", read_small_text(path, 1000)) is not None
    except ArtifactError:
        return path.stat().st_size <= 1  # some systems let nobody read what is locked


def _holder(run: Path) -> str:
    try:
        return read_small_text(run / HOLDER, 100).strip() or "unknown"
    except (OSError, ArtifactError):
        return "unknown"
