"""Compare a run that was made again with what it was expected to come out as, file by file and tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from lowrank_compress.artifacts.manifest import Manifest, read_manifest
from lowrank_compress.errors import ArtifactError
from lowrank_compress.model.checkpoint import Checkpoint
from lowrank_compress.recipe import Recipe
from lowrank_compress.stages.changes import Change, environment_changes, input_changes
from lowrank_compress.stages.description import file_entries, text_of
from lowrank_compress.stages.differences import (
    FileDifference,
    Reference,
    TensorDifference,
    WeightDifference,
    file_differences,
    tensor_differences,
    weight_differences,
)
from lowrank_compress.stages.expectation import Expectation
from lowrank_compress.stages.run import Run

Verdict = Literal["same", "within tolerance", "different"]
EXIT_CODES: dict[Verdict, int] = {"same": 0, "within tolerance": 3, "different": 2}


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
