"""EXPECTED.json: what a run must come out as when it is made again, down to each tensor of each file.

It names nothing of the machine it was made on: the model and the text count by their content. Of every tensor it holds
the hash, so that what differs has a name; of every compressed weight a sketch, so that it can be said by how much (see
`linalg.sketch`) where the expected checkpoint itself is not at hand.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

import lowrank_compress
from lowrank_compress.artifacts.contents import dtype_name, tensor_hash, tensors_of
from lowrank_compress.artifacts.directories import keep_aside
from lowrank_compress.artifacts.files import canonical_hash, parse_json, read_sealed, read_small_text, write_text
from lowrank_compress.artifacts.hashes import file_hashes
from lowrank_compress.artifacts.manifest import Manifest, read_manifest
from lowrank_compress.config import Recipe, load_recipe
from lowrank_compress.errors import ArtifactError, InputError, first_line
from lowrank_compress.linalg.sketch import Sketch, sketch
from lowrank_compress.model.checkpoint import Checkpoint
from lowrank_compress.model.locate import locate
from lowrank_compress.model.reconstruction import reconstruction
from lowrank_compress.stages.common import Run, checkpoint_id, display_name
from lowrank_compress.stages.verification import verify

KIND = "lowrank_compress expectation"
SCHEMA = 1
_BASIS = re.compile(r"basis-[0-9a-f]{8}-(\d+)\.safetensors")
# What is not of the recipe's doing: the model and the text are named by content, the device is of the environment.
_PLACES = {"model", "revision", "calibration", "device"}


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


def expect(path: Path, relative_to: Path | None = None) -> Expectation:
    """Take the expectation of a finished run.

    Parameters
    ----------
    path
        The run.
    relative_to
        Directory of the expectation: if the run lies in it, it is named there, as what to compare with.

    Raises
    ------
    ArtifactError
        The run is unfinished, or something in it, or what it was made from, is not as it was.
    """
    run = Run(path)
    _require_untouched(run)
    recipe = load_recipe(run.recipe, {})
    scores, model = read_manifest(run.scores), read_manifest(run.model)
    if scores is None or model is None:
        raise ArtifactError(f"{path} is not finished. Repeat `lrc compress` on it first.")
    checkpoint = _base_of(recipe, model.key.inputs["checkpoint"], path)
    here = relative_to is not None and path.resolve().is_relative_to(relative_to.resolve())
    return Expectation(
        version=lowrank_compress.__version__,
        recipe=portable(recipe),
        base=_base(checkpoint, display_name(recipe.model)),
        text=text_of(recipe, read_manifest(run.statistics)),
        scores=stage_entry(run.scores, scores),
        model=stage_entry(run.model, model),
        weights=weight_entries(Checkpoint(run.model)),
        checkpoint=path.resolve().relative_to(relative_to.resolve()).as_posix() if here and relative_to else None,
    )


def _require_untouched(run: Run) -> None:
    findings = verify(run.path)
    bad = next((finding for finding in findings if finding["state"] not in ("intact", "dropped")), None)
    if bad is not None:
        raise ArtifactError(
            f"{run.path / bad['file']} is {bad['state']}: an expectation is written of a finished run as its recipe "
            "makes it, to be compared with one made from nothing. Repeat `lrc compress` into a new directory."
        )


def portable(recipe: Recipe) -> dict[str, Any]:
    """Return what of a recipe is the same on every machine."""
    return {name: value for name, value in recipe.settings().items() if name not in _PLACES}


def text_of(recipe: Recipe, calibration: Manifest | None) -> Input | None:
    """Name the text that a calibration read; None where none is needed."""
    found = None if calibration is None else calibration.key.inputs.get("text")
    if found is None or recipe.calibration is None:
        return None
    hub = recipe.calibration.startswith("hf:")
    return Input(name=recipe.calibration if hub else Path(recipe.calibration).name, id=found)


def _base_of(recipe: Recipe, id: str, run: Path) -> Checkpoint:
    """Find the checkpoint that a run was made from; code that was trusted then is part of it, and is not run."""
    for trusted in (False, True):
        checkpoint = Checkpoint(locate(recipe.model, recipe.revision, trusted), trusted)
        if checkpoint_id(checkpoint) == id:
            return checkpoint
    raise ArtifactError(
        f"{recipe.model} is not the checkpoint that {run} was made from: its files have changed since. Restore it: an "
        "expectation names its tensors."
    )


def _base(checkpoint: Checkpoint, name: str) -> Base:
    files = checkpoint.identity()
    return Base(
        name=name,
        id=checkpoint_id(checkpoint),
        files=file_hashes(files),
        tensors=tensor_entries(weight_files(checkpoint)),
    )


def weight_files(checkpoint: Checkpoint) -> list[Path]:
    """Name the files that hold a checkpoint's tensors."""
    return sorted(set(checkpoint.files.values()))


def tensor_entries(files: list[Path]) -> dict[str, TensorEntry]:
    """Describe every tensor of some safetensors files."""
    return {
        name: TensorEntry(dtype=dtype_name(tensor), shape=list(tensor.shape), sha256=tensor_hash(tensor))
        for file, stored, tensor in tensors_of(files)
        for name in [full_name(file, stored)]
    }


def full_name(file: Path, tensor: str) -> str:
    """Name a tensor so that no other of its stage has the name; ids in the names of files are left out."""
    block = _BASIS.fullmatch(file.name)
    return tensor if block is None else f"block {int(block[1])}: {tensor}"


def stage_entry(directory: Path, manifest: Manifest) -> StageEntry:
    """Describe what a stage wrote."""
    holding = [directory / name for name in manifest.outputs if name.endswith(".safetensors")]
    return StageEntry(
        id=manifest.id,
        files=file_entries(directory, manifest),
        tensors=tensor_entries(holding),
        environment=dict(manifest.environment),
    )


def file_entries(directory: Path, manifest: Manifest) -> dict[str, FileEntry]:
    """Describe the files that a stage wrote."""
    return {
        name: FileEntry.model_validate({**written, **(fractions(directory / name) if name.endswith(".json") else {})})
        for name, written in manifest.outputs.items()
    }


def weight_entries(checkpoint: Checkpoint) -> dict[str, WeightEntry]:
    """Sketch everything that a checkpoint computes with."""
    found = {name: sketch(pieces) for name, pieces in reconstruction(checkpoint)}
    return {name: WeightEntry(norm=taken.norm, sketch=taken.text()) for name, taken in found.items()}


def fractions(path: Path) -> dict[str, str]:
    """Part a JSON file into its fractions and all else; nothing where it has none."""
    numbers: list[float] = []

    def without(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: without(entry) for name, entry in value.items()}
        if isinstance(value, list):
            return [without(entry) for entry in value]
        if isinstance(value, float):
            numbers.append(value)
            return "fraction"
        return value

    frame = without(parse_json(read_small_text(path)))
    if not numbers:
        return {}
    packed = base64.b64encode(np.array(numbers, "<f8").tobytes()).decode()
    return {"frame": canonical_hash(frame), "fractions": packed}


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
