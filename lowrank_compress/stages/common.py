"""What all stages share: reporting, identities of inputs, the record of the environment, the layout of a run."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import platform
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

import lowrank_compress
from lowrank_compress.artifacts.files import TEMPORARY, read_json, sha256, write_json
from lowrank_compress.artifacts.lock import LOCK
from lowrank_compress.artifacts.manifest import canonical_hash
from lowrank_compress.calibration.sources import Source, load_hub
from lowrank_compress.errors import ArtifactError, CalibrationError, InputError
from lowrank_compress.model.checkpoint import Checkpoint

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
    def evaluations(self) -> Path:
        """Directory of all evaluations."""
        return self.path / "eval"

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
        own = (LOCK, self.recipe.name, self.recipe.name + TEMPORARY)
        return self.path.exists() and any(path.name not in own for path in self.path.iterdir())

    def final_model(self) -> Path:
        """The directory of the final checkpoint, as run.json names it.

        Raises
        ------
        ArtifactError
            The run has not got that far.
        """
        if not self.index.exists():
            raise ArtifactError(
                f"{self.path} has no run.json: the run has no checkpoint yet. Finish it with `lrc factorize`."
            )
        return self.path / read_json(self.index)["model"]


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
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"The device {name} was asked for, but this torch sees no GPU. Use --device cpu.")
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
    }


def checkpoint_id(checkpoint: Checkpoint) -> str:
    """SHA-256 over a checkpoint's config, weight and tokenizer files; hashes are memoised by path, size and mtime."""
    return canonical_hash(_memoised_hashes(checkpoint.identity()))


def _memoised_hashes(files: Mapping[str, Path]) -> dict[str, str]:
    """Hash files, remembering each hash in the user's cache directory."""
    home = os.environ.get("XDG_CACHE_HOME")
    memo_path = (Path(home) if home else Path.home() / ".cache") / "lowrank_compress" / "hashes.json"
    try:
        memo: dict[str, str] = read_json(memo_path)
    except ArtifactError:
        memo = {}
    hashes: dict[str, str] = {}
    fresh: dict[str, str] = {}
    for name, path in files.items():
        real = path.resolve()
        stat = real.stat()
        key = json.dumps([str(real), stat.st_size, stat.st_mtime_ns])
        if key not in memo:
            fresh[key] = sha256(real)
        hashes[name] = memo.get(key) or fresh[key]
    if fresh:
        # A memo that cannot be kept costs time, not correctness.
        with contextlib.suppress(OSError, ArtifactError):
            write_json(memo_path, memo | fresh)
    return hashes


def source_id(source: Source) -> str:
    """Identity of a text source's content: the hash of a file, the fingerprint of a hub data set.

    Raises
    ------
    CalibrationError
        It does not exist.
    """
    if source.is_hub:
        return f"{source.name}@{load_hub(source)._fingerprint}"
    path = Path(source.name)
    if not path.is_file():
        raise CalibrationError(
            f"The text file {source.name} does not exist. Pass an existing file, or hf:NAME[:CONFIG[:SPLIT]]."
        )
    return sha256(path)


def display_name(model: str) -> str:
    """Name a model without the path to it: the hub name, or the directory's own name."""
    path = Path(model).expanduser()
    return path.resolve().name if path.is_dir() else model
