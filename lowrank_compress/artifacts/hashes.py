"""Hashes of files, remembered in the user's cache directory as long as a file is the same."""

from __future__ import annotations

import contextlib
import json
import os
import stat
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lowrank_compress.artifacts.documents import read_json, write_json
from lowrank_compress.artifacts.files import sha256
from lowrank_compress.errors import ArtifactError

# Of so many files; the hashes of those hashed longest ago are forgotten first.
REMEMBERED = 20_000
# Nanoseconds; a file that changed this recently might change again and look the same.
TICK = 100_000_000


def file_hashes(files: Mapping[str, Path]) -> dict[str, str]:
    """Return the SHA-256 of each file, by the names given.

    A hash is taken from memory where path, size, inode and the times of the last change of content and of status are
    those of the file that was hashed. Nobody but the kernel sets the last one.

    Raises
    ------
    ArtifactError
        A file is no regular one.
    """
    place = _place()
    memo = _read(place)
    keys = {name: _key(path.resolve()) for name, path in files.items()}
    fresh = {name: files[name] for name, key in keys.items() if key not in memo}
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # a hash is computed outside of Python's lock
        found = dict(zip(fresh, pool.map(sha256, fresh.values()), strict=True))
    hashes = {name: found[name] if name in found else memo[key] for name, key in keys.items()}
    lasting = {keys[name]: found[name] for name, path in fresh.items() if _settled(path.resolve(), keys[name])}
    if lasting and place is not None:
        memo = dict([*(_read(place) | lasting).items()][-REMEMBERED:])
        # A memo that cannot be kept costs time, not correctness.
        with contextlib.suppress(OSError, ArtifactError):
            write_json(place, memo)
    return hashes


def cache_directory() -> Path | None:
    """The package's directory in the user's cache; None where the user has no home."""
    named = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(named) if named else Path.home() / ".cache") / "lowrank_compress"
    except RuntimeError:  # no HOME and no entry in passwd, as in some containers
        return None


def _is_private(place: Path) -> bool:
    """Whether nobody but this user (and his group) can have written a file."""
    try:
        found = place.lstat()
    except OSError:
        return False
    mine = not hasattr(os, "geteuid") or found.st_uid == os.geteuid()
    return mine and not found.st_mode & stat.S_IWOTH


def _place() -> Path | None:
    directory = cache_directory()
    return None if directory is None else directory / "hashes.json"


def _key(path: Path) -> str:
    found = path.stat()
    return json.dumps([str(path), found.st_size, found.st_ino, found.st_mtime_ns, found.st_ctime_ns])


def _settled(path: Path, key: str) -> bool:
    """Whether a file has not changed since its key was taken, and cannot have changed within one tick of the clock."""
    return _key(path) == key and time.time_ns() - path.stat().st_ctime_ns > TICK


def _read(place: Path | None) -> dict[str, str]:
    if place is None or not _is_private(place):
        return {}
    try:
        return {key: value for key, value in read_json(place).items() if isinstance(value, str) and len(value) == 64}
    except (ArtifactError, OSError):
        return {}
