"""Whole directories or none: a result that is a directory is built beside its place, and then takes it.

The place may hold a result of ours, and files that are not ours. Of the former, what is as it was written goes; all
else is carried over, under the name NAME.bak where the new result has a file of that name.

A directory cannot be exchanged in one step, so that a process that dies may leave PLACE empty and what was there under
`.PLACE.lrc-…old`; :func:`recover` puts that right, and every use of `replacing` begins with it.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from lowrank_compress.artifacts.files import is_regular, make_directory, sha256, sync
from lowrank_compress.errors import ArtifactError, InputError

Listed = Mapping[str, str]
"""Name of a file, relative to its directory -> the SHA-256 with which we wrote it; "" for the listing itself."""


@contextmanager
def replacing(place: Path, listed: Listed) -> Iterator[Path]:
    """Yield a new, empty directory beside `place`; when the body ends well, it stands there.

    Parameters
    ----------
    place
        Where to.
    listed
        The files in `place` that are ours.

    Raises
    ------
    ArtifactError
        `place` is a file or a link.
    """
    recover(place, listed)
    if place.is_symlink() or (place.exists() and not place.is_dir()):
        raise ArtifactError(f"{place} is a file or a link; expected a directory, or nothing. Move it away.")
    make_directory(place.parent)
    draft = _beside(place, "new")
    try:
        yield draft
        _sync_all(draft)
        old = _beside(place, "old")
        if place.exists():
            os.rename(place, old)
        else:
            old.rmdir()
        os.rename(draft, place)
        sync(place.parent)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)  # nobody else knows its name
        recover(place, listed)
        raise
    if old.exists():
        _empty(old, place, listed)


def recover(place: Path, listed: Listed) -> None:
    """Finish what a process that died left of an exchange of `place`, and remove what it was building."""
    if not place.parent.is_dir():
        return
    for kind in ("old", "new"):
        pattern = re.compile(rf"\.{re.escape(place.name)}\.lrc-[a-z0-9_]{{8}}\.{kind}")
        for entry in sorted(os.scandir(place.parent), key=lambda entry: entry.name):
            if not (pattern.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False)):
                continue
            left = Path(entry.path)
            if kind == "new":
                shutil.rmtree(left)
            elif not any(left.iterdir()):
                left.rmdir()
            elif place.exists():
                _empty(left, place, listed)
            else:
                os.rename(left, place)


def remove_listed(directory: Path, listed: Listed) -> None:
    """Remove from a directory what is as we wrote it, and the directory itself if nothing is left."""
    for name, digest in listed.items():
        if _is_ours(directory / name, digest):
            (directory / name).unlink()
    if directory.is_dir() and not directory.is_symlink() and not any(directory.iterdir()):
        directory.rmdir()


def keep_aside(path: Path) -> Path | None:
    """Move what is at `path` to NAME.bak beside it, if anything is; return where it went."""
    if not os.path.lexists(path):
        return None
    kept = _free_name(path.with_name(f"{path.name}.bak"))
    os.rename(path, kept)
    return kept


def refuse_unsafe(place: Path, option: str, **precious: Path) -> None:
    """Refuse to write a directory where something that matters is.

    Parameters
    ----------
    place
        What is to be written.
    option
        The option that named it.
    precious
        What it is -> its path: `place` must not be it, hold it, or lie in it.

    Raises
    ------
    InputError
        It would; or `place` is, or holds, the working directory, the user's home or the root of the file system.
    """
    real = place.resolve()
    held = {"the root of the file system": Path("/"), "the working directory": Path.cwd()}
    with suppress(RuntimeError):  # nobody's
        held["your home directory"] = Path.home()
    for what, path in held.items():
        if path.resolve().is_relative_to(real):
            raise InputError(
                f"{option} {str(place)!r} is or holds {what}, and cannot be replaced. Name a new directory."
            )
    for what, path in precious.items():
        there = path.resolve()
        if there.is_relative_to(real) or real.is_relative_to(there):
            raise InputError(
                f"{option} {str(place)!r} is, holds or lies in {what.replace('_', ' ')} {path}. Name another directory."
            )


def _beside(place: Path, kind: str) -> Path:
    made = Path(tempfile.mkdtemp(f".{kind}", f".{place.name}.lrc-", place.parent))
    # As others are made here, not for this user alone.
    made.chmod(place.parent.stat().st_mode & 0o777)
    return made


def _sync_all(directory: Path) -> None:
    for path in directory.rglob("*"):
        sync(path)
    sync(directory)


def _is_ours(path: Path, digest: str) -> bool:
    return not path.is_symlink() and is_regular(path) and digest in ("", sha256(path))


def _is_there(path: Path, other: Path) -> bool:
    """Whether two files are the same, so that nothing is lost with one of them."""
    plain = all(is_regular(each) and not each.is_symlink() for each in (path, other))
    return plain and path.stat().st_size == other.stat().st_size and sha256(path) == sha256(other)


def _empty(old: Path, place: Path, listed: Listed) -> None:
    """Take what is ours out of `old`, carry the rest over to `place`, and remove `old`."""
    for path in sorted(old.iterdir()):
        if (path.name in listed and _is_ours(path, listed[path.name])) or _is_there(path, place / path.name):
            path.unlink()
        else:
            os.rename(path, _free_name(place / path.name))
    old.rmdir()


def _free_name(path: Path) -> Path:
    """Find a name that nothing has: this one, or with .bak behind it, and a number behind that."""
    stem = path.name.removesuffix(".bak")
    names = [path, *(path.with_name(f"{stem}.bak{number or ''}") for number in range(1000))]
    return next(name for name in names if not os.path.lexists(name))
