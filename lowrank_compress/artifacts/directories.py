"""Whole directories or none: a result that is a directory is built beside its place, and then takes it.

The place may hold a result of ours, and files that are not ours. Of the former, what is as it was written goes; all
else is carried over, under the name NAME.bak where the new result has a file of that name.

An exchange has a directory of its own beside the place, `.PLACE.lrc-…`, private and locked while its process lives:
`new` is built in it, what was there becomes `old`, and `new` takes the place. A process that dies leaves it behind, and
:func:`recover`, with which every use of `replacing` begins, puts `old` back if nothing has taken its place, or else
takes out of it what is not ours. At every moment the old result or the new one is whole.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from lowrank_compress.artifacts.files import is_regular, make_directory, refuse_full_disk, sha256, sync
from lowrank_compress.errors import ArtifactError, InputError

Listed = Mapping[str, str]
"""Name of a file -> the SHA-256 with which we wrote it; "" for the listing itself; CHANGED where it is another now."""

CHANGED = "changed"

Listing = Callable[[Path], Listed]
"""Reads from a directory which of its files are ours."""

_NEW, _OLD, _LOCK = "new", "old", "lock"


@contextmanager
def replacing(place: Path, listing: Listing) -> Iterator[Path]:
    """Yield a new, empty directory beside `place`; when the body ends well, it stands there.

    Parameters
    ----------
    place
        Where to.
    listing
        Tells which files of an earlier result are ours.

    Raises
    ------
    ArtifactError
        `place` is a file, a link or a mount point, or somebody else has put something there meanwhile.
    """
    make_directory(place.parent)
    recover(place, listing)
    _refuse_no_directory(place)
    before = _identity(place)
    exchange = Path(tempfile.mkdtemp(dir=place.parent, prefix=_prefix(place)))
    lock = FileLock(exchange / _LOCK, timeout=0)
    try:
        lock.acquire()
        draft = exchange / _NEW
        draft.mkdir()
        # As others are made here, not for this user alone.
        draft.chmod(place.parent.stat().st_mode & 0o777)
        yield draft
        _sync_all(draft)
        if _identity(place) != before:
            raise ArtifactError(f"Somebody else has written to {place} meanwhile; it is left as it is. Try again.")
        if before is not None:
            os.rename(place, exchange / _OLD)
        os.rename(draft, place)
        sync(place.parent)
    except BaseException as problem:
        refuse_full_disk(problem, place)
        raise
    finally:
        lock.release()
        _finish(exchange, place, listing)


def recover(place: Path, listing: Listing) -> None:
    """Finish what processes that died have left of exchanges of `place`, and remove what they were building.

    Raises
    ------
    ArtifactError
        What was in the place lies beside it, and something else has taken the place.
    """
    if not place.parent.is_dir():
        return
    pattern = re.compile(re.escape(_prefix(place)) + "[a-z0-9_]{8}")
    for entry in sorted(os.scandir(place.parent), key=lambda entry: entry.name):
        if pattern.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
            _finish(Path(entry.path), place, listing)


def _finish(exchange: Path, place: Path, listing: Listing) -> None:
    """End an exchange, wherever it has come to, unless its process lives."""
    lock = exchange / _LOCK
    if lock.is_symlink() or (lock.exists() and not is_regular(lock)):
        return  # nothing that we made
    holding = FileLock(lock, timeout=0)
    try:
        holding.acquire()
    except Timeout:
        return
    try:
        old, new = exchange / _OLD, exchange / _NEW
        if old.is_dir() and not old.is_symlink():
            if os.path.lexists(new):  # it has not taken the place
                _put_back(old, place)
            else:
                _empty(old, place, listing(old))
        if new.is_dir() and not new.is_symlink():
            shutil.rmtree(new)  # nobody else could write into it
    finally:
        holding.release()
    lock.unlink(missing_ok=True)
    with suppress(OSError):  # somebody has put something into it
        exchange.rmdir()


def _put_back(old: Path, place: Path) -> None:
    with suppress(OSError):
        place.rmdir()  # if it is empty
    if os.path.lexists(place):
        raise ArtifactError(
            f"A process that was replacing {place} died, and what was there is now {old}; but something else has taken "
            f"its place. Move one of them away, then repeat the command."
        )
    os.rename(old, place)


def _empty(old: Path, place: Path, listed: Listed) -> None:
    """Carry over to `place` what is not ours, remove what is (the listing last), and `old` with it."""
    ours, changed = [], []
    for path in sorted(old.iterdir()):
        below = {name.partition("/")[2]: digest for name, digest in listed.items() if name.startswith(f"{path.name}/")}
        if below and path.is_dir() and not path.is_symlink():
            (place / path.name).mkdir(exist_ok=True)
            _empty(path, place / path.name, below)
            with suppress(OSError):  # something is in it
                (place / path.name).rmdir()
        elif (path.name in listed and _is_ours(path, listed[path.name])) or _is_same(path, place / path.name):
            ours.append(path)
        elif path.name in listed:
            changed.append(path)
        else:
            os.rename(path, _free_name(place / path.name))
    for path in changed:  # it does not belong to the new result, even where that has none of this name
        os.rename(path, _free_name(place / f"{path.name}.bak"))
    for path in sorted(ours, key=lambda path: listed.get(path.name) == ""):
        path.unlink()
    with suppress(OSError):  # somebody has put something into it, which the next one carries over
        old.rmdir()


def _prefix(place: Path) -> str:
    """What an exchange's name begins with; a name that leaves no room for more is hashed."""
    name = place.name
    if len(os.fsencode(name)) > 200:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()
    return f".{name}.lrc-"


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.lstat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def _refuse_no_directory(place: Path) -> None:
    if place.is_symlink() or (place.exists() and not place.is_dir()):
        raise ArtifactError(f"{place} is a file or a link; expected a directory, or nothing. Move it away.")
    if os.path.ismount(place):
        raise ArtifactError(
            f"{place} is a mount point, which cannot be exchanged as a whole. Name a directory inside it."
        )


def remove_listed(directory: Path, listed: Listed) -> None:
    """Remove from a directory what is as we wrote it, and the directory itself if nothing is left."""
    for name, digest in listed.items():
        if not (directory / name).parent.is_symlink() and _is_ours(directory / name, digest):
            (directory / name).unlink()
            if "/" in name:
                with suppress(OSError):  # something else is in it
                    (directory / name).parent.rmdir()
    if directory.is_dir() and not directory.is_symlink() and not any(directory.iterdir()):
        directory.rmdir()


def refuse_link(directory: Path) -> None:
    """Refuse to write into a directory of a run that is elsewhere.

    Raises
    ------
    ArtifactError
        It is a link.
    """
    if directory.is_symlink():
        raise ArtifactError(f"{directory} is a link; expected a directory of the run itself. Replace it by one.")


def link(path: Path, name: Path) -> None:
    """Give a file a second name, where the file system knows such; else copy it."""
    try:
        os.link(path, name)
    except OSError:
        shutil.copyfile(path, name)


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


def files_in(directory: Path) -> list[str]:
    """Name the files of a directory and of those below it, each by its path from there."""
    return sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if not path.is_dir())


def _sync_all(directory: Path) -> None:
    for path in directory.rglob("*"):
        sync(path)
    sync(directory)


def _is_ours(path: Path, digest: str) -> bool:
    if digest == CHANGED or path.is_symlink() or not is_regular(path):
        return False
    return digest in ("", sha256(path))


def _is_same(path: Path, other: Path) -> bool:
    """Whether two names are of one file, or of the same bytes: nothing is lost with one of them."""
    if not all(is_regular(file) and not file.is_symlink() for file in (path, other)):
        return False
    return path.samefile(other) or (path.stat().st_size == other.stat().st_size and sha256(path) == sha256(other))


def _free_name(path: Path) -> Path:
    """Find a name that nothing has: this one, or with .bak behind it, and a number behind that."""
    stem = path.name.removesuffix(".bak")
    names = [path, *(path.with_name(f"{stem}.bak{number or ''}") for number in range(1000))]
    return next(name for name in names if not os.path.lexists(name))
