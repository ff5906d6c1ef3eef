"""Describe a run and what it was made from: every file, every tensor, every weight that is computed with."""

from __future__ import annotations

import base64
import re
from pathlib import Path
from typing import Any

import numpy as np

import lowrank_compress
from lowrank_compress.artifacts.contents import dtype_name, tensor_hash, tensors_of
from lowrank_compress.artifacts.documents import canonical_hash, parse_json
from lowrank_compress.artifacts.files import read_small_text
from lowrank_compress.artifacts.hashes import file_hashes
from lowrank_compress.artifacts.manifest import Manifest, read_manifest
from lowrank_compress.errors import ArtifactError
from lowrank_compress.linalg.sketch import sketch
from lowrank_compress.model.checkpoint import Checkpoint
from lowrank_compress.model.locate import locate
from lowrank_compress.model.reconstruction import reconstruction
from lowrank_compress.recipe import Recipe, load_recipe
from lowrank_compress.stages.expectation import (
    Base,
    Expectation,
    FileEntry,
    Input,
    StageEntry,
    TensorEntry,
    WeightEntry,
)
from lowrank_compress.stages.identity import checkpoint_id, display_name, text_name
from lowrank_compress.stages.index import read_index
from lowrank_compress.stages.run import Run
from lowrank_compress.stages.verification import verify

_BASIS = re.compile(r"(basis|rival|second)-[0-9a-f]{8}-(\d+)\.safetensors")
# What is not of the recipe's doing: the model and the text are named by content, the device is of the environment.
_PLACES = {"model", "revision", "calibration", "device"}


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
    checkpoint = _base_of(recipe, read_index(run.index).base_id, path)
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
    texts = recipe.calibration
    several = () if isinstance(texts, str) else texts
    name = ", ".join(f"{text_name(part.text)}:{part.weight:g}" for part in several) or text_name(str(texts))
    return Input(name=name, id=found)


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
    return tensor if block is None else f"{block[1]} of block {int(block[2])}: {tensor}"


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
