"""What all stages share: reporting, identities of inputs, the record of the environment, the layout of a run."""

from __future__ import annotations

import hashlib
import itertools
import platform
import warnings
from collections.abc import Collection, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import torch

import lowrank_compress
from lowrank_compress.artifacts.files import canonical_hash, is_temporary, read_sealed, read_small_text, sha256
from lowrank_compress.artifacts.hashes import file_hashes
from lowrank_compress.artifacts.lock import HOLDER, LOCK
from lowrank_compress.artifacts.manifest import MANIFEST, Manifest, read_manifest, require_intact
from lowrank_compress.calibration.hub import hub_id
from lowrank_compress.calibration.sources import Source
from lowrank_compress.calibration.textfiles import check_file
from lowrank_compress.config import RECIPE_BYTES, Recipe
from lowrank_compress.errors import ArtifactError, CalibrationError, InputError
from lowrank_compress.model.checkpoint import Checkpoint
from lowrank_compress.stages.hardware import hardware

Item = TypeVar("Item")


class Reporter(Protocol):
    """Where a stage says how far it is."""

    def advance(self, step: str, done: int, total: int) -> None:
        """Say that `done` of `total` pieces of a step are finished."""
        ...

    def warn(self, text: str) -> None:
        """Say something that the user should know but that stops nothing."""
        ...


class Silent:
    """Shows no progress, and hands warnings to Python."""

    def advance(self, step: str, done: int, total: int) -> None:
        """Do nothing."""

    def warn(self, text: str) -> None:
        """Issue a Python warning."""
        warnings.warn(text, stacklevel=2)


def in_parts(items: Iterable[Item], size: int) -> Iterator[tuple[int, list[Item]]]:
    """Yield items by parts of `size`, the last of what is left, each with how many there have been by then."""
    remaining, done = iter(items), 0
    while part := list(itertools.islice(remaining, size)):
        done += len(part)
        yield done, part


@dataclass(frozen=True)
class Finished:
    """The final checkpoint of a run.

    Attributes
    ----------
    path
        Its directory.
    manifest
        That of the stage that wrote it.
    index
        run.json: what it was made from.
    """

    path: Path
    manifest: Manifest
    index: Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """Names inside a run directory."""

    path: Path

    @property
    def statistics(self) -> Path:
        """Directory of the calibrate stage."""
        return self.path / "stats"

    @property
    def scores(self) -> Path:
        """Directory of the score stage."""
        return self.path / "scores"

    @property
    def model(self) -> Path:
        """The checkpoint that the factorize stage writes."""
        return self.path / "model"

    @property
    def work(self) -> Path:
        """Blocks that are encoded while the checkpoint is not written yet."""
        return self.path / "work"

    @property
    def evaluations(self) -> Path:
        """Directory of all evaluations."""
        return self.path / "eval"

    @property
    def parts(self) -> tuple[Path, ...]:
        """All directories of a run, whether they are there or not."""
        return self.statistics, self.scores, self.work, self.model, self.evaluations

    @property
    def recipe(self) -> Path:
        """The resolved recipe."""
        return self.path / "recipe.yaml"

    @property
    def index(self) -> Path:
        """run.json: which directory is the final checkpoint, and what it was made from."""
        return self.path / "run.json"

    def begun(self) -> bool:
        """Whether the directory holds more than a recipe: work, or something else's files."""
        own = (LOCK, HOLDER, self.recipe.name)
        return self.path.exists() and any(
            path.name not in own and not is_temporary(path) for path in self.path.iterdir()
        )

    def exists(self) -> bool:
        """Whether the directory is a run: its recipe is one that this program wrote, be it edited since."""
        return recipe_state(self.recipe) in ("ours", "edited")

    def require(self) -> None:
        """Raise an ArtifactError unless the directory is a run."""
        if not self.exists():
            raise ArtifactError(
                f"{self.path} is no run: it has no recipe.yaml of this program. Pass the directory that --out named, "
                "or make a run with `lrc compress`."
            )

    def finished(self, names: Collection[str] | None = None, editable: Container[str] = ()) -> Finished:
        """The final checkpoint, as run.json names it and with the bytes it was written with.

        Parameters
        ----------
        names
            The files of it that are read; None for all.
        editable
            Files of it that may have changed.

        Raises
        ------
        ArtifactError
            The run has not got that far, or something was changed since.
        """
        if not self.index.exists():
            raise ArtifactError(
                f"{self.path} has no run.json: the run has no checkpoint yet. Finish it with `lrc factorize`."
            )
        index = read_sealed(self.index)
        if index.get("model") != self.model.name:
            raise ArtifactError(
                f"{self.index} names {index.get('model')!r} as the checkpoint; expected {self.model.name!r}."
            )
        manifest = read_manifest(self.model)
        if manifest is None:
            raise ArtifactError(f"{self.model} is not finished. Repeat `lrc compress` or `lrc factorize` on this run.")
        if index.get("id") != manifest.id:
            raise ArtifactError(
                f"{self.model} is not the checkpoint that {self.index.name} names: it was replaced, or a command was "
                "interrupted. Repeat `lrc compress` or `lrc factorize` on this run."
            )
        require_intact(self.model, manifest, editable, names=names)
        require_alone(self.model, manifest)
        return Finished(self.model, manifest, index)


# Endings and names of files that transformers, or an other loader of checkpoints, looks for.
_LOADED = (
    *(".json", ".safetensors", ".py", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".jinja", ".model"),
    *("vocab.txt", "merges.txt", "additional_chat_templates"),
)


def strangers(directory: Path, manifest: Manifest) -> list[str]:
    """Name what is not of a checkpoint of ours and yet would be loaded with it."""
    names = {path.name for path in directory.iterdir()} - {*manifest.outputs, MANIFEST}
    return sorted(name for name in names if name.lower().endswith(_LOADED))


def require_alone(directory: Path, manifest: Manifest) -> None:
    """Refuse a checkpoint among files that change what is loaded from its directory.

    Raises
    ------
    ArtifactError
        There is such a file.
    """
    if found := strangers(directory, manifest):
        raise ArtifactError(
            f"{directory / found[0]} is not of the checkpoint that was written there, but would be loaded with it. "
            "Move it elsewhere."
        )


# The first lines of a run's recipe: the second says by a hash whether what follows is as it was written.
_HEADER = (
    "# The options of this run, defaults written out; `lrc compress --config` with this file repeats it.\n# sha256 "
)


def recipe_text(recipe: Recipe) -> str:
    """Render the recipe.yaml of a run."""
    text = recipe.to_yaml()
    return f"{_HEADER}{hashlib.sha256(text.encode()).hexdigest()}\n{text}"


def recipe_state(path: Path) -> Literal["none", "ours", "edited", "foreign"]:
    """Tell whether a recipe is as this program wrote it, was edited since, or is somebody else's.

    Raises
    ------
    ArtifactError
        It is no file that can be read.
    """
    try:
        text = read_small_text(path, RECIPE_BYTES)
    except FileNotFoundError:
        return "none"
    if not text.startswith(_HEADER):
        return "foreign"
    digest, _, rest = text.removeprefix(_HEADER).partition("\n")
    return "ours" if digest == hashlib.sha256(rest.encode()).hexdigest() else "edited"


def compute_device(name: str) -> torch.device:
    """Resolve ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.

    Raises
    ------
    InputError
        There is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"Unknown device {name!r}; expected auto, cpu, cuda or cuda:N.") from None
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"The device {name} is not supported; expected auto, cpu, cuda or cuda:N.")
    if device.type == "cpu":
        return torch.device("cpu")  # there is one, whatever its number
    if not torch.cuda.is_available():
        raise InputError(f"The device {name} was asked for, but this torch sees no GPU. Use --device cpu.")
    if (device.index or 0) >= (count := torch.cuda.device_count()):
        raise InputError(f"The device {name} was asked for, but this torch sees {count} GPUs, from cuda:0 on.")
    return device


def environment(device: str) -> dict[str, Any]:
    """Record where a result was computed."""
    import numpy
    import scipy
    import transformers

    return {
        "lowrank_compress": lowrank_compress.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": numpy.__version__,
        "scipy": scipy.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "device": device if device == "cpu" else torch.cuda.get_device_name(device),
        **hardware(),
    }


def checkpoint_id(checkpoint: Checkpoint) -> str:
    """SHA-256 over a checkpoint's config, weight and tokenizer files; their hashes are remembered."""
    return canonical_hash(file_hashes(checkpoint.identity()))


def source_id(source: Source) -> str:
    """Identity of a text source's content: the hash of a file, the fingerprint of a hub data set.

    Raises
    ------
    CalibrationError
        It does not exist, or cannot be read.
    """
    if source.is_hub:
        return hub_id(source.name)
    check_file(source.name)
    try:
        return sha256(Path(source.name))
    except OSError as problem:
        raise CalibrationError(f"{source.name} cannot be read ({problem}). Expected a readable file.") from None


def display_name(model: str) -> str:
    """Name a model without the path to it: the hub name, or the directory's own name."""
    path = Path(model).expanduser()
    return path.resolve().name if path.is_dir() else model
