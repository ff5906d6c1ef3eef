"""The one place from which files are written, and through which files of unknown origin are read.

The law, for every writer of this package:

- What is written goes to a file of its own in the same directory, under a name that nobody can foresee, created anew
  (never through a link that somebody has put there), synced, and renamed: whole or not at all, and what was there
  before stands until then.
- What is removed is what a manifest of ours lists, with the hash that it lists (see `artifacts.directories`), or a
  temporary file of ours that a killed process has left.

The law for readers: a run or a checkpoint may have come from anybody. Only regular files are opened, small ones are no
larger than they can honestly be, and what is read back is under a hash. Somebody who computes all hashes anew is not
found out; he cannot run code, write elsewhere, or make this program hang.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path

from lowrank_compress.errors import ArtifactError

# Larger than any configuration, manifest or index that is one.
SMALL = 64 << 20
_PREFIX, _SUFFIX = ".lrc-", ".tmp"
_TEMPORARY = re.compile(r"\.lrc-[a-z0-9_]{8}\.tmp")


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a new file beside `path`, then rename it; a failure leaves nothing behind.

    Parameters
    ----------
    path
        Where to. A symbolic link there is replaced, not followed.
    write
        Writes to the path that it is given, where an empty file is.

    Raises
    ------
    ArtifactError
        The disk is full, or there is a directory at `path`.
    """
    make_directory(path.parent)
    if path.is_dir() and not path.is_symlink():
        raise ArtifactError(f"{path} is a directory where a file is to be written. Move it, or choose another place.")
    descriptor, name = tempfile.mkstemp(_SUFFIX, _PREFIX, path.parent)
    temporary = Path(name)
    os.close(descriptor)
    try:
        write(temporary)
        sync(temporary)
        # Temporary files are for nobody else to read; who may enter the directory may read what is in it.
        temporary.chmod(path.parent.stat().st_mode & 0o664)
        os.replace(temporary, path)
        sync(path.parent)
    except BaseException as problem:
        temporary.unlink(missing_ok=True)
        refuse_full_disk(problem, path)
        raise


def make_directory(path: Path) -> None:
    """Make a directory and what leads to it, if it is not there.

    Raises
    ------
    ArtifactError
        Something else is there.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ArtifactError(f"{path} is to be a directory, but a file is in its place. Choose another place.") from None


def sync(path: Path) -> None:
    """Have a file's bytes, or a directory's names, on the disk."""
    if os.name == "nt" and path.is_dir():
        return  # no such thing there
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_temporary(path: Path) -> bool:
    """Tell whether a file is one that a process of ours, perhaps killed, has not yet given its name."""
    return _TEMPORARY.fullmatch(path.name) is not None and path.is_file() and not path.is_symlink()


def sweep(directory: Path) -> None:
    """Remove temporary files that a killed process of ours has left in a directory that nobody else works in."""
    if directory.is_dir():
        for path in directory.iterdir():
            if is_temporary(path):
                path.unlink()


def is_disk_full(problem: BaseException) -> bool:
    """Tell whether an error says that a file system has no room; safetensors reports it as text only."""
    return (isinstance(problem, OSError) and problem.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)) or any(
        words in str(problem) for words in ("os error 28", "os error 122", "os error 27")
    )


def refuse_full_disk(problem: BaseException, path: Path) -> None:
    """Raise an ArtifactError if a problem in writing `path` is a full disk."""
    if is_disk_full(problem):
        raise ArtifactError(
            f"The disk is full: {path} could not be written. Free some space (`lrc compress --dry-run` prints the disk "
            "that a run needs) and repeat the command; finished blocks are kept."
        ) from problem


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    write_atomically(path, lambda target: _write(target, text))


def _write(target: Path, text: str) -> None:
    target.write_text(text, encoding="utf-8")


def is_regular(path: Path) -> bool:
    """Tell whether a path leads to a regular file, which opening and reading cannot make anybody wait for."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except (OSError, ValueError):
        return False


def read_bytes(path: Path, limit: int = SMALL) -> bytes:
    """Read a small file.

    Raises
    ------
    FileNotFoundError
        It is not there.
    ArtifactError
        It is no regular file, cannot be read, or is larger than `limit` bytes.
    """
    try:
        # Not to wait for a writer of a named pipe.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path)) from None
    except (OSError, ValueError) as problem:
        raise ArtifactError(f"{path} cannot be read ({problem}). Expected a readable file.") from None
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode):
        os.close(descriptor)
        raise ArtifactError(f"{path} is no regular file; expected one. Remove it, or choose another directory.")
    with open(descriptor, "rb") as file:
        if found.st_size > limit:
            raise ArtifactError(f"{path} has {found.st_size:,} bytes; no such file has more than {limit:,}.")
        try:
            return file.read(limit + 1)
        except OSError as problem:  # a disk that fails, or a file that is one in name only, as under /proc
            raise ArtifactError(f"{path} cannot be read ({problem}). Expected a readable file.") from None


def read_small_text(path: Path, limit: int = SMALL) -> str:
    """Read a small UTF-8 file.

    Raises
    ------
    FileNotFoundError
        It is not there.
    ArtifactError
        It is no regular file, too large, or not UTF-8.
    """
    try:
        return read_bytes(path, limit).decode("utf-8")
    except UnicodeDecodeError as problem:
        raise ArtifactError(f"{path} is not UTF-8 text ({problem}).") from None


def sha256(path: Path) -> str:
    """Hash a file's bytes.

    Raises
    ------
    ArtifactError
        It is no regular file, or cannot be read.
    """
    if path.exists() and not is_regular(path):
        raise ArtifactError(f"{path} is no regular file; expected one. Remove it, or choose another directory.")
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as handle:
            while chunk := handle.read(1 << 20):
                digest.update(chunk)
    except FileNotFoundError:
        raise
    except OSError as problem:
        raise ArtifactError(f"{path} cannot be read ({problem}). Expected a readable file.") from None
    return digest.hexdigest()
