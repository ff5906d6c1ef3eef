"""JSON as this package writes and reads it: whole objects, some of them with a hash over themselves."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowrank_compress.artifacts.files import read_small_text, write_text
from lowrank_compress.errors import ArtifactError

MEND = "Repair it or repeat the stage that writes it with --overwrite."


def write_json(path: Path, value: object) -> None:
    """Write a JSON file atomically, indented, keys in the order given."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # a path that is not UTF-8
        text = json.dumps(value, indent=2)
    write_text(path, text + "\n")


def parse_json(text: str, *, unique: bool = False) -> Any:
    """Parse JSON.

    Parameters
    ----------
    unique
        Refuse an object that has a key twice; else the last one counts, as it does for Python.

    Raises
    ------
    ValueError
        It is not JSON, or nested too deep.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if unique and len(found) != len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} is there twice")
        return found

    try:
        return json.loads(text, object_pairs_hook=once)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def read_json(path: Path, *, unique: bool = True, mend: str = MEND) -> dict[str, Any]:
    """Read a JSON object.

    Parameters
    ----------
    unique
        Refuse a key that is there twice.
    mend
        What the user can do about a file that is none, for the message.

    Raises
    ------
    ArtifactError
        The file is missing, cannot be read, or is not a JSON object.
    """
    try:
        value = parse_json(read_small_text(path), unique=unique)
    except FileNotFoundError:
        raise ArtifactError(f"{path} does not exist. {mend}") from None
    except ValueError as problem:
        raise ArtifactError(f"{path} cannot be read as JSON ({problem}). {mend}") from problem
    if not isinstance(value, dict):
        raise ArtifactError(f"{path} holds a JSON {type(value).__name__}; expected an object.")
    return value


def canonical_hash(value: object) -> str:
    """Hash a JSON value independently of key order and formatting."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def write_sealed(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object with a hash over itself, for `read_sealed`."""
    write_json(path, {**value, "digest": canonical_hash(value)})


def read_sealed(path: Path) -> dict[str, Any]:
    """Read what `write_sealed` wrote.

    Raises
    ------
    ArtifactError
        It is missing, or not as it was written.
    """
    found = read_json(path)
    digest = found.pop("digest", None)
    if digest is None:
        raise ArtifactError(
            f"{path} has no hash of itself: it was edited, or written by an older version of this program. Repeat the "
            "stage that writes it with --overwrite."
        )
    try:
        intact = digest == canonical_hash(found)
    except ValueError:
        intact = False  # numbers that are none
    if not intact:
        raise ArtifactError(
            f"{path} is not as it was written (its hash differs). Repeat the stage that writes it with --overwrite."
        )
    return found
