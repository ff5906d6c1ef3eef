"""Compare a run that was made again with what it was expected to come out as, file by file and tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lowrank_compress.artifacts.hashes import file_hashes
from lowrank_compress.artifacts.manifest import Manifest, read_manifest
from lowrank_compress.errors import ArtifactError, InputError
from lowrank_compress.model.checkpoint import Checkpoint
from lowrank_compress.recipe import Recipe
from lowrank_compress.stages.description import file_entries, portable, text_of, weight_files
from lowrank_compress.stages.differences import (
    Reference,
    TensorDifference,
    WeightDifference,
    tensor_differences,
    weight_differences,
)
from lowrank_compress.stages.expectation import Expectation, FileEntry, Input, StageEntry
from lowrank_compress.stages.identity import checkpoint_id
from lowrank_compress.stages.run import Run

Verdict = Literal["same", "within tolerance", "different"]
EXIT_CODES: dict[Verdict, int] = {"same": 0, "within tolerance": 3, "different": 2}
# A predicted loss is the small square of what is left of a weight: it moves by more than the weight does.
LOSS_MOVES = 100.0


@dataclass(frozen=True)
class Change:
    """Something that is another than expected; what is not there is "none"."""

    what: str
    expected: str
    found: str


@dataclass(frozen=True)
class FileDifference:
    """A file of a run that is not as expected.

    Attributes
    ----------
    state
        "missing", "not expected", "other bytes", or, within a tolerance, "other fractions" (in a JSON file, near
        enough) and "judged by weights" (tensors).
    """

    file: str
    state: str


@dataclass(frozen=True)
class Comparison:
    """What a comparison found.

    Attributes
    ----------
    environment
        Versions, processor, threads, device: what makes other bytes legitimate.
    inputs
        The text, and the files and tensors of the model, that are not the expected ones.
    files
        Those of the run that are not as expected.
    tensors
        Stored tensors that are not as expected.
    weights
        Of everything that the checkpoint computes with, how far it is from what was expected, the farthest first; empty
        where all stored tensors are the same.
    reference
        The directories that single elements were compared with.
    compared
        How many files and tensors were.
    """

    verdict: Verdict
    tolerance: float | None
    environment: Sequence[Change]
    inputs: Sequence[Change]
    files: Sequence[FileDifference]
    tensors: Sequence[TensorDifference]
    weights: Sequence[WeightDifference]
    reference: Sequence[str]
    compared: Mapping[str, int]

    @property
    def exit_code(self) -> int:
        """0 for the same bytes, 3 within tolerance, 2 otherwise."""
        return EXIT_CODES[self.verdict]

    def report(self) -> dict[str, Any]:
        """Return everything, for JSON, which has no infinity: None is the distance to what is not there."""
        found = asdict(self)
        for weight in found["weights"]:
            weight["distance"] = weight["distance"] if math.isfinite(weight["distance"]) else None
        return {"exit_code": self.exit_code, **found}


def require_recipe(expectation: Expectation, recipe: Recipe) -> None:
    """Refuse to compare runs of different recipes.

    Raises
    ------
    InputError
        The recipe (defaults decided) is another one; an option that the expectation does not know has its default.
    """
    asked = portable(recipe)
    for name in sorted({*asked, *expectation.recipe}):
        known = Recipe.model_fields.get(name)
        default = None if known is None else known.get_default()
        there, here = expectation.recipe.get(name, default), asked.get(name, default)
        if there != here:
            raise InputError(
                f"The expectation is of another recipe: {name} is {there!r} there and {here!r} here. Pass the recipe "
                "it was written for, or write a new expectation with `lrc verify RUN --write`."
            )


def environment_changes(expected: Mapping[str, Any], found: Mapping[str, Any]) -> list[Change]:
    """Name what of two environments differs."""
    names = dict.fromkeys([*expected, *found])
    pairs = [(name, _said(expected.get(name)), _said(found.get(name))) for name in names]
    return [Change(*pair) for pair in pairs if pair[1] != pair[2]]


def _said(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name}={entry}" for name, entry in value.items()) or "none"
    return "none" if value is None else str(value)


def input_changes(expectation: Expectation, base: Checkpoint, text: Input | None) -> list[Change]:
    """Name what of the inputs is another than expected: the text, files and tensors of the model."""
    found = []
    if (expectation.text and expectation.text.id) != (text and text.id):
        found.append(Change("calibration text", *map(_input_said, (expectation.text, text))))
    if checkpoint_id(base) == expectation.base.id:
        return found
    files = base.identity()
    hashes = file_hashes(files)
    for name in dict.fromkeys([*expectation.base.files, *hashes]):
        one, two = expectation.base.files.get(name), hashes.get(name)
        if one != two:
            found.append(Change(f"base file {name}", _short(one), _short(two)))
    holding = StageEntry(id="", files={}, tensors=expectation.base.tensors, environment={})
    differing = tensor_differences("base", holding, weight_files(base), Reference({}))
    return found + [Change(f"base tensor {each.tensor}", "as written", each.problem) for each in differing]


def _input_said(given: Input | None) -> str:
    return "none" if given is None else f"{given.name} ({_short(given.id)})"


def _short(digest: str | None) -> str:
    return "none" if digest is None else digest[:12]


def compare(
    expectation: Expectation,
    path: Path,
    recipe: Recipe,
    base: Checkpoint,
    *,
    tolerance: float | None = None,
    reference: Reference = Reference({}),
) -> Comparison:
    """Compare a run with what was expected.

    Parameters
    ----------
    expectation
        What was.
    path
        The run.
    recipe
        Its recipe.
    base
        The dense checkpoint that it was made from.
    tolerance
        Largest distance of a weight, relative to its norm, that counts as the same; None to ask for the same bytes.
    reference
        The expected run, to compare elements with; what of it is not as expected is left aside.

    Raises
    ------
    ArtifactError
        The run is not finished.
    """
    run = Run(path)
    manifests = {"scores": finished(run.scores), "model": finished(run.model)}
    reference = reference.usable(expectation)
    expected, environment = expectation.stages(), {}
    files: list[FileDifference] = []
    tensors: list[TensorDifference] = []
    for stage, manifest in manifests.items():
        directory = run.path / stage
        files += file_differences(stage, expected[stage].files, file_entries(directory, manifest), tolerance)
        holding = sorted(directory / name for name in manifest.outputs if name.endswith(".safetensors"))
        tensors += tensor_differences(stage, expected[stage], holding, reference)
        changes = environment_changes(expected[stage].environment, manifest.environment)
        environment |= dict.fromkeys(changes)
    weights: list[WeightDifference] = []
    if any(each.stage == "model" for each in tensors):
        there = reference.directories.get("model")
        weights = weight_differences(
            expectation.weights, Checkpoint(run.model), None if there is None else Checkpoint(there)
        )
        weights.sort(key=lambda each: -each.distance)
    inputs = input_changes(expectation, base, text_of(recipe, read_manifest(run.statistics)))
    return Comparison(
        verdict=_verdict(files, weights, inputs, tolerance),
        tolerance=tolerance,
        environment=list(environment),
        inputs=inputs,
        files=files,
        tensors=tensors,
        weights=weights,
        reference=[str(directory) for directory in reference.directories.values()],
        compared={
            "files": sum(len(stage.files) for stage in expected.values()),
            "tensors": sum(len(stage.tensors) for stage in expected.values()),
            "weights": len(expectation.weights),
        },
    )


def finished(directory: Path) -> Manifest:
    """Read the manifest of a stage that must be finished.

    Raises
    ------
    ArtifactError
        It is not.
    """
    manifest = read_manifest(directory)
    if manifest is None:
        raise ArtifactError(f"{directory} is not finished. Repeat `lrc compress` on this run first.")
    return manifest


def file_differences(
    stage: str, expected: Mapping[str, FileEntry], found: Mapping[str, FileEntry], tolerance: float | None
) -> list[FileDifference]:
    """Name the files of a stage that are not as expected; within a tolerance, say which may differ."""
    differences = []
    for name in dict.fromkeys([*expected, *found]):
        one, two = expected.get(name), found.get(name)
        if one is not None and two is not None and one.sha256 == two.sha256:
            continue
        state = "missing" if two is None else "not expected" if one is None else "other bytes"
        if tolerance is not None and name.endswith(".safetensors"):
            state = "judged by weights"
        elif tolerance is not None and one is not None and two is not None and _near(one, two, tolerance):
            state = "other fractions"
        differences.append(FileDifference(f"{stage}/{name}", state))
    return differences


def _near(one: FileEntry, two: FileEntry, tolerance: float) -> bool:
    """Whether two JSON files differ in fractions alone, and in these by little."""
    if one.frame is None or one.frame != two.frame:
        return False
    left, right = one.numbers(), two.numbers()
    return left.shape == right.shape and np.allclose(right, left, rtol=LOSS_MOVES * tolerance, atol=tolerance**2)


def _verdict(
    files: Sequence[FileDifference],
    weights: Sequence[WeightDifference],
    inputs: Sequence[Change],
    tolerance: float | None,
) -> Verdict:
    if not files:
        return "same"
    # A tolerance is for the last bits of other machines; the inputs have the same bytes on all of them.
    if tolerance is None or inputs or any(each.state not in ("judged by weights", "other fractions") for each in files):
        return "different"
    return "within tolerance" if all(each.distance <= tolerance for each in weights) else "different"
