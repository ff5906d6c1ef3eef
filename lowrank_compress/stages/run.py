"""The layout of a run: its directories, its recipe, and the checkpoint that it has come to."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Container, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lowrank_compress.artifacts.directories import recover
from lowrank_compress.artifacts.files import is_temporary, read_small_text
from lowrank_compress.artifacts.lock import HOLDER, LOCK, locked
from lowrank_compress.artifacts.manifest import (
    MANIFEST,
    Key,
    Manifest,
    committed,
    listed,
    read_manifest,
    require_intact,
)
from lowrank_compress.errors import ArtifactError
from lowrank_compress.recipe import Recipe
from lowrank_compress.recipefile import RECIPE_BYTES
from lowrank_compress.resources.resources import Resources
from lowrank_compress.resources.workers import Workers, workers_of
from lowrank_compress.stages.index import Index, Link, read_index


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
    index: Index


def work_of(out: Path) -> Path:
    """Where a stage that writes a checkpoint keeps what is finished of it: in the run, or beside what is none's."""
    run = Run(out.parent)
    return run.work if run.exists() else out.with_name(f"{out.name}.work")


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
    def unrefined(self) -> Path:
        """The checkpoint that the factorize stage writes where a refined one takes the place of the model."""
        return self.path / "unrefined"

    @property
    def unquantized(self) -> Path:
        """The checkpoint that the factorize stage writes where one in few bits takes the place of the model."""
        return self.path / "unquantized"

    @property
    def work(self) -> Path:
        """Blocks that are encoded while the checkpoint is not written yet."""
        return self.path / "work"

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
        """run.json: what the run was made from, and which directories hold its checkpoints."""
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

    def finished(
        self, names: Collection[str] | None = None, editable: Container[str] = (), *, before: str | None = None
    ) -> Finished:
        """The final checkpoint, as run.json names it and with the bytes it was written with.

        Parameters
        ----------
        names
            The files of it that are read; None for all.
        editable
            Files of it that may have changed.
        before
            A stage that writes checkpoints: find the one that it starts from instead.

        Raises
        ------
        ArtifactError
            The run has not got that far, or something was changed since.
        """
        if not self.index.exists():
            raise ArtifactError(
                f"{self.path} has no run.json: the run has no checkpoint yet. Finish it with `lrc factorize`."
            )
        index = read_index(self.index)
        chain = index.chain if before is None else index.before(before)
        # One that is gone cannot be taken for another; all others must be what the last was made from.
        manifests = [self._written(link) for link in chain]
        if not manifests or (manifest := manifests[-1]) is None:
            last = chain[-1] if chain else Link("factorize", self.model.name, "")
            raise ArtifactError(f"{self.path / last.directory} is not finished. Repeat `lrc {last.stage}` on this run.")
        path = self.path / chain[-1].directory
        require_intact(path, manifest, editable, names=names)
        require_alone(path, manifest)
        return Finished(path, manifest, index)

    def _written(self, link: Link) -> Manifest | None:
        """The manifest of a link of the chain; None if its checkpoint is gone.

        Raises
        ------
        ArtifactError
            Another result is there: what follows in the chain was not made from it.
        """
        manifest = read_manifest(self.path / link.directory)
        if manifest is not None and (manifest.key.stage, manifest.id) != (link.stage, link.id):
            raise ArtifactError(
                f"{self.path / link.directory} is not the checkpoint that {self.index.name} names: it was replaced, or "
                f"a command was interrupted. Repeat `lrc {link.stage}` on this run."
            )
        return manifest


# Endings and names of files that transformers, or an other loader of checkpoints, looks for.
LOADED = (
    *(".json", ".safetensors", ".py", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".jinja", ".model"),
    *("vocab.txt", "merges.txt", "additional_chat_templates"),
)


def strangers(directory: Path, manifest: Manifest) -> list[str]:
    """Name what is not of a checkpoint of ours and yet would be loaded with it."""
    names = {path.name for path in directory.iterdir()} - {*manifest.outputs, MANIFEST}
    return sorted(name for name in names if name.lower().endswith(LOADED))


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


def made_already(out_dir: Path, identity: Key, *, overwrite: bool) -> Manifest | None:
    """Find the checkpoint that a stage is to write, finished and alone in its directory; None if it is not there.

    Raises
    ------
    ArtifactError
        Another result is there, and is not to be replaced; or files are that would be loaded with it.
    """
    recover(out_dir, listed)
    if (found := committed(out_dir, identity, overwrite=overwrite)) is not None:
        require_alone(out_dir, found)
    return found


def made_once(
    out_dir: Path, identity: Key, make: Callable[[], Manifest], workers: Workers, *, overwrite: bool
) -> Manifest:
    """Have the first process make a checkpoint, unless it is there (`made_already`); all get its manifest."""
    return workers.once(lambda: made_already(out_dir, identity, overwrite=overwrite) or make())


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


@contextmanager
def working(run: Run | None, memory: int | None = None) -> Iterator[Resources]:
    """Join the processes that torchrun started, if it did, and lock the run directory they work in, if there is one.

    `memory` are the bytes that each is to get by with; None for what is free.
    """
    with workers_of() as workers, locked(run.path) if run is not None and workers.is_first else nullcontext():
        yield Resources(memory, workers)
