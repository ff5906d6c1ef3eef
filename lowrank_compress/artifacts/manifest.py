"""The manifest of a stage: its content-addressed id, its outputs, and the commit marker.

The id of a stage is the SHA-256 of the canonical form (sorted keys, no blanks) of everything that changes its result:
stage name, stage version, config and the ids of its inputs. The manifest is written last, by rename: a directory
without one holds unfinished work.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Container, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from lowrank_compress.artifacts.directories import CHANGED, Listed, refuse_link, remove_listed
from lowrank_compress.artifacts.documents import canonical_hash, read_sealed, write_sealed
from lowrank_compress.artifacts.files import is_regular, sha256, sweep
from lowrank_compress.artifacts.hashes import file_hashes
from lowrank_compress.errors import ArtifactError

log = logging.getLogger(__name__)
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


def read_manifest(directory: Path) -> Manifest | None:
    """Read a stage's manifest; None if the stage is not committed.

    Raises
    ------
    ArtifactError
        The manifest is not one, is not as it was written, or its id is not the hash of its key.
    """
    path = directory / MANIFEST
    if not path.exists():
        return None
    found = read_sealed(path)
    try:
        manifest = Manifest(Key(**found["key"]), found["outputs"], found["report"], found["environment"])
        plain = all(_is_inside(name) and set(entry) == {"sha256", "size"} for name, entry in found["outputs"].items())
        if manifest.id == found["id"] and plain:
            return manifest
    except (KeyError, TypeError, AttributeError, ValueError):
        pass
    raise ArtifactError(
        f"{path} is damaged or was written by another version of this program. Repeat the stage with --overwrite."
    )


def _is_inside(name: str) -> bool:
    """Whether a name is of a file of the directory itself, or of one directly below it."""
    path = Path(name)
    return path.as_posix() == name and not path.is_absolute() and len(path.parts) in (1, 2) and ".." not in path.parts


def commit(
    directory: Path, key: Key, outputs: Iterable[str], report: Mapping[str, Any], environment: Mapping[str, Any]
) -> Manifest:
    """Hash the outputs and write the manifest: from here on the stage counts as done.

    What an earlier manifest lists and this one does not is removed, where it is as it was written.
    """
    names = sorted(outputs)
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # a hash is computed outside of Python's lock
        described = dict(zip(names, pool.map(lambda name: describe(directory / name), names), strict=True))
    manifest = Manifest(key, described, dict(report), dict(environment))
    before = listed(directory)
    _write(directory, manifest)
    remove_listed(directory, {name: digest for name, digest in before.items() if name not in {*described, MANIFEST}})
    sweep(directory)
    return manifest


def relist(directory: Path, manifest: Manifest, name: str) -> Manifest:
    """Take an output as it is now into a manifest, for one that may change without the result being another."""
    made = replace(manifest, outputs={**manifest.outputs, name: describe(directory / name)})
    _write(directory, made)
    return made


def _write(directory: Path, manifest: Manifest) -> None:
    write_sealed(directory / MANIFEST, {"schema": SCHEMA, "id": manifest.id, **asdict(manifest)})


def describe(path: Path) -> dict[str, Any]:
    """Size and hash of one output."""
    return {"sha256": sha256(path), "size": path.stat().st_size}


def listed(directory: Path) -> Listed:
    """Name the files of a directory that are a result of ours, with the hashes they were written with.

    One of another size was changed, and may be too large to hash.
    """
    try:
        found = read_manifest(directory)
    except ArtifactError:
        found = None
    if found is None:
        return {}
    whole = set(of_size(directory, found))
    return {name: entry["sha256"] if name in whole else CHANGED for name, entry in found.outputs.items()} | {
        MANIFEST: ""
    }


def committed(directory: Path, key: Key, *, overwrite: bool = False, editable: Container[str] = ()) -> Manifest | None:
    """Return the manifest if this very result is on disk, with the bytes it was written with; None if it is to be made.

    Nothing is removed: another result stands until the new one is complete.

    Parameters
    ----------
    directory
        The stage's directory.
    key
        What is to be computed.
    overwrite
        Make anew a result of another key, or one whose bytes have changed, instead of refusing it.
    editable
        Outputs that people may change.

    Raises
    ------
    ArtifactError
        Another result is there (the message names the first key that differs), or one that was changed.
    """
    refuse_link(directory)
    try:
        found = read_manifest(directory)
    except ArtifactError:
        if overwrite:
            return None
        raise
    if found is None:
        return None
    if found.id != key.id:
        if overwrite:
            return None
        raise ArtifactError(
            f"{directory} holds the result of another recipe: {difference(asdict(found.key), asdict(key))}. "
            "Choose another directory with --out, or pass --overwrite to replace it."
        )
    if missing(directory, found):
        return None  # the stage verifies and reuses what is whole
    changed = [name for name in altered(directory, found) if name not in editable]
    if not changed:
        log.info("%s is there already, from the same recipe (%s)", directory, found.id[:12])
        return found
    if overwrite:
        return None
    raise ArtifactError(
        f"{directory / changed[0]} is not as it was written{_more(changed)}. Restore it, or pass --overwrite to make "
        "it again (what was changed is kept beside it)."
    )


def require_intact(
    directory: Path, manifest: Manifest, editable: Container[str] = (), *, names: Collection[str] | None = None
) -> None:
    """Refuse to build on a result that is not as it was written.

    Parameters
    ----------
    editable
        Outputs that people may change.
    names
        The outputs that are read; None for all.

    Raises
    ------
    ArtifactError
        A file is missing or changed.
    """
    changed = [name for name in altered(directory, manifest, names=names) if name not in editable]
    if changed:
        raise ArtifactError(
            f"{directory / changed[0]} is missing or not as it was written{_more(changed)}. Restore it, or repeat the "
            f"{manifest.key.stage} stage with --overwrite."
        )


def _more(names: list[str]) -> str:
    return f" (nor are {len(names) - 1} other files)" if len(names) > 1 else ""


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
    return [name for name in manifest.outputs if not is_regular(directory / name)]


def of_size(directory: Path, manifest: Manifest) -> list[str]:
    """Name the outputs that are there with the size they were written with: others need not be read."""
    return [
        name
        for name, recorded in manifest.outputs.items()
        if is_regular(directory / name) and (directory / name).stat().st_size == recorded["size"]
    ]


def altered(
    directory: Path, manifest: Manifest, *, names: Collection[str] | None = None, remember: bool = True
) -> list[str]:
    """Name the outputs that are missing or whose bytes are not the recorded ones.

    Parameters
    ----------
    names
        The outputs to look at; None for all.
    remember
        Trust hashes taken before of the same files (`hashes.file_hashes`); else read every byte.
    """
    outputs = {name: entry for name, entry in manifest.outputs.items() if names is None or name in names}
    there = {name: directory / name for name in of_size(directory, manifest) if name in outputs}
    found = file_hashes(there) if remember else {name: sha256(path) for name, path in there.items()}
    return [name for name, recorded in outputs.items() if found.get(name) != recorded["sha256"]]
