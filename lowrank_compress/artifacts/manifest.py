"""The manifest of a stage: its content-addressed id, its outputs, and the commit marker.

The id of a stage is the SHA-256 of the canonical form (sorted keys, no blanks) of everything that changes its result:
stage name, stage version, config and the ids of its inputs. The manifest is written last, by rename: a directory
without one holds unfinished work.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lowrank_compress.artifacts.files import read_json, sha256, write_json
from lowrank_compress.errors import ArtifactError

SCHEMA = 1
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Key:
    """Everything that changes the result of a stage."""

    stage: str
    version: int
    config: Mapping[str, Any]
    inputs: Mapping[str, str]

    @property
    def id(self) -> str:
        """SHA-256 of the canonical form."""
        return canonical_hash(asdict(self) | {"schema": SCHEMA})


@dataclass(frozen=True)
class Manifest:
    """What a committed stage directory says about itself.

    Attributes
    ----------
    key
        What the id is the hash of.
    outputs
        File name -> {"sha256", "size"}.
    report
        Facts for people and later stages that follow from the key (token counts, reached ratio).
    environment
        Where it was computed: versions, threads, device. Not in the id.
    """

    key: Key
    outputs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    report: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """The id of the stage's result."""
        return self.key.id


def canonical_hash(value: object) -> str:
    """Hash a JSON value independently of key order and formatting."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def read_manifest(directory: Path) -> Manifest | None:
    """Read a stage's manifest; None if the stage is not committed.

    Raises
    ------
    ArtifactError
        The manifest is not one, or its id is not the hash of its key.
    """
    path = directory / MANIFEST
    if not path.exists():
        return None
    found = read_json(path)
    try:
        manifest = Manifest(Key(**found["key"]), found["outputs"], found["report"], found["environment"])
        if manifest.id == found["id"]:
            return manifest
    except (KeyError, TypeError):
        pass
    raise ArtifactError(
        f"{path} is damaged or was written by another version of this program. Repeat the stage with --overwrite."
    )


def commit(
    directory: Path, key: Key, outputs: Iterable[str], report: Mapping[str, Any], environment: Mapping[str, Any]
) -> Manifest:
    """Hash the outputs and write the manifest: from here on the stage counts as done."""
    names = sorted(outputs)
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # a hash is computed outside of Python's lock
        described = dict(zip(names, pool.map(lambda name: describe(directory / name), names), strict=True))
    manifest = Manifest(key, described, dict(report), dict(environment))
    write_json(directory / MANIFEST, {"schema": SCHEMA, "id": manifest.id, **asdict(manifest)})
    return manifest


def describe(path: Path) -> dict[str, Any]:
    """Size and hash of one output."""
    return {"sha256": sha256(path), "size": path.stat().st_size}


def committed(directory: Path, key: Key, *, overwrite: bool = False) -> Manifest | None:
    """Return the manifest if this very result is on disk, None if there is none or it lacks a file.

    Parameters
    ----------
    directory
        The stage's directory.
    key
        What is to be computed.
    overwrite
        Remove a result of another key instead of refusing it, and one of this key whose bytes have changed.

    Raises
    ------
    ArtifactError
        Another result is there; the message names the first key that differs.
    """
    found = read_manifest(directory) if not overwrite else _lenient(directory)
    if found is None:
        return None
    if found.id == key.id and not (altered(directory, found) if overwrite else missing(directory, found)):
        return found
    if found.id == key.id:
        (directory / MANIFEST).unlink()  # the stage verifies and reuses what is whole
        return None
    if overwrite:
        shutil.rmtree(directory)
        return None
    raise ArtifactError(
        f"{directory} holds the result of another recipe: {difference(asdict(found.key), asdict(key))}. "
        "Choose another directory with --out, or pass --overwrite to replace it."
    )


def _lenient(directory: Path) -> Manifest | None:
    """Read a manifest that is about to be replaced; a damaged one is removed with its stage."""
    try:
        return read_manifest(directory)
    except ArtifactError:
        shutil.rmtree(directory)
        return None


def difference(there: Mapping[str, Any], asked: Mapping[str, Any], path: str = "") -> str:
    """Name the first key in which two nested mappings differ, with both values."""
    for name in [*there, *(name for name in asked if name not in there)]:
        left, right = there.get(name), asked.get(name)
        if left == right:
            continue
        where = f"{path}.{name}" if path else str(name)
        if isinstance(left, Mapping) and isinstance(right, Mapping):
            return difference(left, right, where)
        return f"{where} is {left!r} there and {right!r} here"
    return "nothing differs"


def missing(directory: Path, manifest: Manifest) -> list[str]:
    """Name the outputs that are not there; much quicker than `altered`."""
    return [name for name in manifest.outputs if not (directory / name).exists()]


def altered(directory: Path, manifest: Manifest) -> list[str]:
    """Name the outputs that are missing or whose bytes are not the recorded ones."""
    wrong = []
    for name, recorded in manifest.outputs.items():
        path = directory / name
        if not path.exists() or path.stat().st_size != recorded["size"] or sha256(path) != recorded["sha256"]:
            wrong.append(name)
    return wrong
