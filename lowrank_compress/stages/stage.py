"""What a stage of the pipeline is, as an entry of the table of stages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lowrank_compress.artifacts.manifest import Manifest
from lowrank_compress.model.checkpoint import Checkpoint
from lowrank_compress.stages.run import Run
from lowrank_compress.strict import Strict

Reads = Literal["recipe", "checkpoint"]
Writes = Literal["data", "checkpoint", "measurements"]


@dataclass(frozen=True)
class Given:
    """What a stage is given that starts from a checkpoint.

    Attributes
    ----------
    checkpoint
        The checkpoint.
    report
        What the stages before have reported of it: asked and reached ratio, sizes. None where nothing is known.
    dense
        The dense original, for a stage that looks at both.
    """

    checkpoint: Checkpoint
    report: Mapping[str, Any] | None = None
    dense: Checkpoint | None = None


@dataclass(frozen=True)
class Stage:
    """A step of the pipeline: a pure function of a config and of what it reads, which leaves files and a manifest.

    Attributes
    ----------
    name
        What its manifests, `run.json` and messages call it.
    version
        Another where the same config and inputs give another result than before.
    config
        All that can be asked of it.
    inputs
        Makes what it reads: ``inputs(plan, run)`` for a stage of the recipe; ``inputs(checkpoint, report, dense)``, as
        `Given` does, for one that starts from a checkpoint.
    run
        ``run(config, inputs, out_dir, reporter, *, resources, overwrite)`` returns the manifest, which is written last.
    reads
        "recipe" for what `lrc compress` does; "checkpoint" for what can follow any checkpoint of ours.
    writes
        "data" for later stages of the recipe; "checkpoint", with its ``lowrank.json``; or "measurements" of one, each
        in ``directory/ID/``, as they never conflict.
    directory
        Where in a run; for a new stage its name.
    command
        The command of `lrc` that runs it.
    help
        One line for ``lrc list``.
    needs_dense
        Whether one that makes a checkpoint from a checkpoint looks at the dense original, too.
    editable
        Files that people may edit -> whether an edited one fits the rest of the result.
    """

    name: str
    version: int
    config: type[Strict]
    inputs: Callable[..., Any]
    run: Callable[..., Manifest]
    reads: Reads
    writes: Writes
    directory: str
    command: str
    help: str
    needs_dense: bool = False
    editable: Mapping[str, Callable[[Run, Path, Manifest], bool]] = field(default_factory=dict)

    @property
    def changes_weights(self) -> bool:
        """Whether it makes a checkpoint from a checkpoint, and so becomes a link of a run's chain."""
        return self.reads == "checkpoint" and self.writes == "checkpoint"
