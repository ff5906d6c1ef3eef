"""EXPECTED.json: what a run must come out as when it is made again, down to each tensor of each file.

It names nothing of the machine it was made on: the model and the text count by their content. Of every tensor it holds
the hash, so that what differs has a name; of every compressed weight a sketch, so that it can be said by how much (see
`linalg.sketch`) where the expected checkpoint itself is not at hand.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from lowrank_compress.artifacts.directories import keep_aside
from lowrank_compress.artifacts.documents import canonical_hash, parse_json, read_sealed
from lowrank_compress.artifacts.files import read_small_text, write_text
from lowrank_compress.errors import ArtifactError, InputError, first_line
from lowrank_compress.linalg.sketch import Sketch

KIND = "lowrank_compress expectation"
SCHEMA = 1


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FileEntry(_Part):
    """A file: its hash and size; and of a JSON file, the hash of all but its fractions, and these (base64, float64)."""

    sha256: str
    size: int
    frame: str | None = None
    fractions: str | None = None

    def numbers(self) -> np.ndarray:
        """Return the fractions."""
        return np.frombuffer(base64.b64decode(self.fractions or ""), "<f8")


class TensorEntry(_Part):
    """A tensor as it is stored; the hash is of its bytes."""

    dtype: str
    shape: list[int]
    sha256: str


class WeightEntry(_Part):
    """A weight multiplied out (see `model.reconstruction`): its norm and its sketch."""

    norm: float
    sketch: str

    def sketched(self) -> Sketch:
        """Return both as they were taken."""
        return Sketch.parse(self.norm, self.sketch)


class StageEntry(_Part):
    """What a stage wrote, by the names of its files and of the tensors in them, and where it was computed."""

    id: str
    files: dict[str, FileEntry]
    tensors: dict[str, TensorEntry]
    environment: dict[str, Any]


class Input(_Part):
    """A model or a text: a name for people, and what it is by content."""

    name: str
    id: str


class Base(Input):
    """The dense checkpoint, with its files and tensors, so that one that differs has a name."""

    files: dict[str, str]
    tensors: dict[str, TensorEntry]


class Expectation(_Part):
    """All of EXPECTED.json."""

    kind: Literal["lowrank_compress expectation"] = KIND
    version: str
    recipe: dict[str, Any]
    base: Base
    text: Input | None = None
    scores: StageEntry
    model: StageEntry
    weights: dict[str, WeightEntry]
    checkpoint: str | None = None

    def stages(self) -> dict[str, StageEntry]:
        """Return the entries of the directories of a run, by their names."""
        return {"scores": self.scores, "model": self.model}


def write_expectation(path: Path, expectation: Expectation, *, overwrite: bool = False) -> None:
    """Write EXPECTED.json, whole or not at all; it replaces an expectation, and nothing else unless told to.

    Raises
    ------
    InputError
        There is something else at `path`, and it is not to be replaced.
    """
    if path.is_dir():
        raise InputError(f"{path} is a directory; expected the name of a file, existing or not.")
    if (path.exists() or path.is_symlink()) and not is_expectation(path):
        if not overwrite:
            raise InputError(
                f"{path} exists and is no expectation of this program. Choose another name, or pass --overwrite: what "
                "is there is then kept beside it."
            )
        keep_aside(path)
    found = {"schema": SCHEMA, **expectation.model_dump(mode="json", exclude_none=True)}
    write_text(path, _by_lines(found | {"digest": canonical_hash(found)}) + "\n")


def _by_lines(value: Any, indent: str = "") -> str:
    """Render JSON with one tensor or file a line, for people to compare two of them."""
    if not isinstance(value, dict) or not any(isinstance(entry, dict) for entry in value.values()):
        return json.dumps(value, ensure_ascii=False)
    inner = indent + "  "
    entries = (f"{inner}{json.dumps(name)}: {_by_lines(entry, inner)}" for name, entry in value.items())
    return "{\n" + ",\n".join(entries) + f"\n{indent}}}"


def is_expectation(path: Path) -> bool:
    """Tell whether a file is one that `write_expectation` wrote, be it edited since."""
    try:
        found = parse_json(read_small_text(path))
    except (OSError, ArtifactError, ValueError):
        return False
    return isinstance(found, Mapping) and found.get("kind") == KIND


def read_expectation(path: Path) -> Expectation:
    """Read EXPECTED.json.

    Raises
    ------
    InputError
        There is no expectation at `path`, it was edited, or another version of this program wrote it.
    """
    if not is_expectation(path):
        what = "is no expectation of this program" if path.exists() else "does not exist"
        raise InputError(f"{path} {what}. Write one with `lrc verify RUN --write {path}`.")
    try:
        found = read_sealed(path)
    except ArtifactError:
        raise InputError(
            f"{path} was changed since it was written (its hash differs). Restore it, or write it anew with "
            f"`lrc verify RUN --write {path}`."
        ) from None
    if (schema := found.pop("schema", None)) != SCHEMA:
        raise InputError(
            f"{path} has schema {json.dumps(schema)}; this version of the program reads {SCHEMA}. Write it anew with "
            f"`lrc verify RUN --write {path}`."
        )
    try:
        json.dumps(found, ensure_ascii=False).encode()  # half characters cannot be printed
        read = Expectation.model_validate(found)
        for entry in read.weights.values():
            entry.sketched()
        for entry in [*read.scores.files.values(), *read.model.files.values()]:
            entry.numbers()
    except (ValidationError, ValueError) as problem:
        raise InputError(
            f"{path} is damaged ({first_line(problem)}). Write it anew with `lrc verify RUN --write {path}`."
        ) from None
    return read
