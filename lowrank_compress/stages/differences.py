"""How far files and tensors are from what was expected: by elements where these are at hand, else by sketch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from lowrank_compress.artifacts.contents import dtype_name, raw, tensor_hash, tensors_of
from lowrank_compress.artifacts.hashes import file_hashes
from lowrank_compress.linalg.sketch import relative, sketch
from lowrank_compress.model.checkpoint import Checkpoint
from lowrank_compress.model.reconstruction import reconstruction
from lowrank_compress.stages.description import full_name
from lowrank_compress.stages.expectation import Expectation, FileEntry, StageEntry, TensorEntry, WeightEntry
from lowrank_compress.stages.run import Run

# A predicted loss is the small square of what is left of a weight: it moves by more than the weight does.
LOSS_MOVES = 100.0


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
class Elements:
    """What differs between two tensors of one shape and dtype.

    Attributes
    ----------
    index, expected, found
        Of the first element with other bytes.
    count
        How many have.
    largest
        Largest difference of an element, relative to the larger of both.
    norm
        Frobenius norm of the difference, relative to the expected tensor's.
    """

    index: tuple[int, ...]
    expected: float
    found: float
    count: int
    largest: float
    norm: float


@dataclass(frozen=True)
class TensorDifference:
    """A stored tensor that is not as expected; `elements` where the expected one is at hand."""

    stage: str
    tensor: str
    problem: str
    elements: Elements | None = None


@dataclass(frozen=True)
class WeightDifference:
    """How far a weight is from what was expected, relative to its norm; infinitely far where it has no counterpart."""

    weight: str
    distance: float
    estimated: bool


@dataclass(frozen=True)
class Reference:
    """The expected run, or its checkpoint alone: directories by stage."""

    directories: Mapping[str, Path]

    @classmethod
    def at(cls, path: Path) -> Reference:
        """Take a run, or the checkpoint in one, or a copy of the latter."""
        run = Run(path)
        if not run.exists() and Run(path.parent).exists() and Run(path.parent).model == path:
            run = Run(path.parent)
        return cls({"scores": run.scores, "model": run.model} if run.exists() else {"model": path})

    def usable(self, expectation: Expectation) -> Reference:
        """Return those of its directories that hold just the bytes that were expected."""
        kept = {
            stage: directory
            for stage, directory in self.directories.items()
            if _holds(directory, expectation.stages()[stage])
        }
        return Reference(kept)

    def tensors(self, stage: str, expected: StageEntry) -> dict[str, Path]:
        """Return the file that holds each tensor of a stage."""
        if stage not in self.directories:
            return {}
        found: dict[str, Path] = {}
        for path in _weights(self.directories[stage], expected):
            with safe_open(path, framework="pt") as handle:
                found |= {full_name(path, stored): path for stored in handle.keys()}  # noqa: SIM118
        return found


def _weights(directory: Path, expected: StageEntry) -> list[Path]:
    return [directory / name for name in expected.files if name.endswith(".safetensors")]


def _holds(directory: Path, expected: StageEntry) -> bool:
    names = [name for name in expected.files if name.endswith(".safetensors") or name == "config.json"]
    if not all((directory / name).is_file() for name in names):
        return False
    hashes = file_hashes({name: directory / name for name in names})
    return all(hashes[name] == expected.files[name].sha256 for name in names)


def unlike(expected: Mapping[str, str], found: Mapping[str, str]) -> dict[str, tuple[str | None, str | None]]:
    """Return the names under which two tables do not say the same, with what each says; None for nothing."""
    pairs = {name: (expected.get(name), found.get(name)) for name in [*expected, *found]}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def file_differences(
    stage: str, expected: Mapping[str, FileEntry], found: Mapping[str, FileEntry], tolerance: float | None
) -> list[FileDifference]:
    """Name the files of a stage that are not as expected; within a tolerance, say which may differ."""
    differences = []
    hashes = ({name: entry.sha256 for name, entry in entries.items()} for entries in (expected, found))
    for name in unlike(*hashes):
        one, two = expected.get(name), found.get(name)
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


def tensor_differences(
    stage: str, expected: StageEntry, files: Iterable[Path], reference: Reference
) -> Iterator[TensorDifference]:
    """Yield the tensors in the files of a stage that are not as expected, missing ones last."""
    there = reference.tensors(stage, expected)
    missing = dict(expected.tensors)
    for file, stored, tensor in tensors_of(files):
        name = full_name(file, stored)
        entry = missing.pop(name, None)
        if entry is None:
            yield TensorDifference(stage, name, "not expected")
        elif problem := _stored_otherwise(entry, tensor):
            yield TensorDifference(stage, name, problem)
        elif entry.sha256 != tensor_hash(tensor):
            elements = None
            if name in there:
                with safe_open(there[name], framework="pt") as handle:
                    elements = compare_elements(handle.get_tensor(stored), tensor)
            yield TensorDifference(stage, name, "other values", elements)
    yield from (TensorDifference(stage, name, "missing") for name in missing)


def _stored_otherwise(entry: TensorEntry, tensor: Tensor) -> str | None:
    """Say how dtype and shape differ from what was expected, if they do."""
    found, expected = (dtype_name(tensor), list(tensor.shape)), (entry.dtype, entry.shape)
    if found == expected:
        return None
    return f"{found[0]} {_sizes(found[1])}, expected {expected[0]} {_sizes(expected[1])}"


def _sizes(shape: Iterable[int]) -> str:
    return "×".join(map(str, shape)) or "scalar"


def compare_elements(expected: Tensor, found: Tensor) -> Elements:
    """Compare two tensors of one shape and dtype that differ in at least one byte."""
    differs = (raw(expected) != raw(found)).any(1)
    first = int(differs.nonzero()[0])
    one, two = (tensor.flatten().to(torch.float64) for tensor in (expected, found))
    gap = (one - two).abs()
    larger = torch.maximum(one.abs(), two.abs())
    return Elements(
        index=tuple(int(place) for place in torch.unravel_index(torch.tensor(first), expected.shape)),
        expected=one[first].item(),
        found=two[first].item(),
        count=int(differs.sum()),
        largest=float(torch.where(gap > 0, gap / larger, 0.0).max()),
        norm=relative(float(gap.norm()), float(one.norm())),
    )


def weight_differences(
    expected: Mapping[str, WeightEntry], model: Checkpoint, reference: Checkpoint | None
) -> list[WeightDifference]:
    """Say of everything that a checkpoint computes with how far it is from what was expected.

    Parameters
    ----------
    expected
        Sketches: distances are estimated by these (see `linalg.sketch`) where there is no reference.
    model
        What was found.
    reference
        The expected checkpoint, for exact distances.
    """
    left, differences = dict(expected), []
    there = iter(()) if reference is None else reconstruction(reference)
    for name, pieces in reconstruction(model):
        entry = left.pop(name, None)
        other, wanted = next(there, (None, ()))
        if entry is None:
            differences.append(WeightDifference(name, math.inf, False))
        elif other == name:
            differences.append(WeightDifference(name, _distance(wanted, pieces), False))
        else:
            there = iter(())  # the two are built differently from here on
            differences.append(WeightDifference(name, entry.sketched().distance(sketch(pieces)), True))
    return [*differences, *(WeightDifference(name, math.inf, False) for name in left)]


def _distance(expected: Iterable[Tensor], found: Iterable[Tensor]) -> float:
    """Frobenius norm of the difference of two tensors that come in the same pieces, relative to the expected one's."""
    gap = size = 0.0
    for one, two in zip(expected, found, strict=True):
        wide = one.to(torch.float64)
        gap += float((wide - two.to(torch.float64)).square().sum())
        size += float(wide.square().sum())
    return relative(math.sqrt(gap), math.sqrt(size))
