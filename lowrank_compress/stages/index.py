"""run.json: what a run was made from, and the chain of stages that wrote its checkpoints, the last of them final."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lowrank_compress.artifacts.directories import keep_aside
from lowrank_compress.artifacts.documents import read_sealed, write_sealed
from lowrank_compress.errors import ArtifactError

SCHEMA = 2


@dataclass(frozen=True)
class Link:
    """A stage that wrote a checkpoint: its name, its directory in the run, the id of its result."""

    stage: str
    directory: str
    id: str


@dataclass(frozen=True)
class Index:
    """All of run.json.

    Attributes
    ----------
    base, revision, base_id
        The dense checkpoint that the run was made from: name or directory, and its id.
    chain
        Who wrote checkpoints, each from the one before it; the first from the dense one.
    """

    base: str
    revision: str | None
    base_id: str
    chain: tuple[Link, ...]

    def before(self, stage: str) -> tuple[Link, ...]:
        """Return what a stage started from, or is to start from: the links before its own, all where it has none."""
        stages = [link.stage for link in self.chain]
        return self.chain[: stages.index(stage)] if stage in stages else self.chain

    def directory(self, stage: str, default: str) -> str:
        """Name the directory in which a stage has its result; where it is no link, a default."""
        return next((link.directory for link in self.chain if link.stage == stage), default)

    def extended(self, link: Link) -> Index:
        """Put a link where its stage has its place; what was made from another result of it is left out."""
        return self if link in self.chain else replace(self, chain=(*self.before(link.stage), link))


def read_index(path: Path) -> Index:
    """Read run.json.

    Raises
    ------
    ArtifactError
        It is missing, not as it was written, or of another version of this program.
    """
    found = read_sealed(path)
    try:
        index = Index(found["base"], found["revision"], found["base_id"], tuple(_chain(found)))
        if isinstance(index.base, str) and _is_sound(index.chain):
            return index
    except (KeyError, TypeError, AttributeError):
        pass
    raise ArtifactError(
        f"{path} is damaged or was written by another version of this program. Repeat `lrc factorize` on this run."
    )


def _chain(found: Mapping[str, Any]) -> list[Link]:
    if found["schema"] == 1:  # there was one stage that wrote a checkpoint
        return [Link("factorize", found["model"], found["id"])]
    return [Link(**entry) for entry in found["chain"]] if found["schema"] == SCHEMA else []


def _is_sound(chain: tuple[Link, ...]) -> bool:
    """Whether there is a chain of stages, each there once, that name directories of the run itself."""
    texts = all(isinstance(text, str) for link in chain for text in (link.stage, link.directory, link.id))
    return (
        texts
        and len(chain) == len({link.stage for link in chain}) == len({link.directory for link in chain}) > 0
        and all(Path(link.directory).name == link.directory not in ("", "..") for link in chain)
    )


def write_index(path: Path, index: Index) -> None:
    """Write run.json, unless it says so already; one that is no longer as it was written is kept aside."""
    said = {"schema": SCHEMA, **asdict(index), "chain": [asdict(link) for link in index.chain]}
    try:
        if read_sealed(path) == said:
            return
    except ArtifactError:
        keep_aside(path)
    write_sealed(path, said)
