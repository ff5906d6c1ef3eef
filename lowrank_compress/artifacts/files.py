"""Whole files or none: every artefact is written under a temporary name, synced and renamed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

from lowrank_compress.errors import ArtifactError

TEMPORARY = ".partial"


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside `path`, then rename it; a failure leaves nothing behind.

    Raises
    ------
    ArtifactError
        The disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        write(temporary)
        with open(temporary, "rb+") as handle:
            os.fsync(handle.fileno())
        # safetensors makes files that nobody else can read; who may enter the directory may read what is in it.
        temporary.chmod(path.parent.stat().st_mode & 0o666)
        os.replace(temporary, path)
    except BaseException as problem:
        temporary.unlink(missing_ok=True)
        if is_disk_full(problem):
            raise ArtifactError(
                f"The disk is full: {path} could not be written. Free some space (`lrc compress --dry-run` prints the "
                "disk that a run needs) and repeat the command; finished blocks are kept."
            ) from problem
        raise


def is_disk_full(problem: BaseException) -> bool:
    """Tell whether an error says that a file system has no room; safetensors reports it as text only."""
    return (isinstance(problem, OSError) and problem.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)) or any(
        words in str(problem) for words in ("os error 28", "os error 122", "os error 27")
    )


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    write_atomically(path, lambda target: _write(target, text))


def _write(target: Path, text: str) -> None:
    target.write_text(text, encoding="utf-8")


def write_json(path: Path, value: object) -> None:
    """Write a JSON file atomically, indented, keys in the order given."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> dict:
    """Read a JSON object.

    Raises
    ------
    ArtifactError
        The file is missing, or is not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(f"{path} does not exist; expected a file written by an earlier stage.") from None
    except (ValueError, OSError) as problem:
        raise ArtifactError(
            f"{path} cannot be read as JSON ({problem}). Repair it or repeat the stage with --overwrite."
        ) from problem
    if not isinstance(value, dict):
        raise ArtifactError(f"{path} holds a JSON {type(value).__name__}; expected an object.")
    return value


def sha256(path: Path) -> str:
    """Hash a file's bytes."""
    with open(path, "rb") as handle:
        digest = hashlib.sha256()
        while chunk := handle.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
