"""Stages that make a checkpoint from a checkpoint: in a run, whose chain they extend, or beside any checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lowrank_compress.artifacts.directories import recover
from lowrank_compress.artifacts.files import sweep
from lowrank_compress.artifacts.manifest import Manifest, listed, read_manifest
from lowrank_compress.errors import ArtifactError, InputError
from lowrank_compress.model.checkpoint import Checkpoint
from lowrank_compress.model.locate import locate
from lowrank_compress.resources.cost import Meter
from lowrank_compress.resources.resources import Resources
from lowrank_compress.stages.cost import keep_cost
from lowrank_compress.stages.identity import checkpoint_id
from lowrank_compress.stages.index import Index, Link, write_index
from lowrank_compress.stages.reporting import Reporter, Silent
from lowrank_compress.stages.run import Run
from lowrank_compress.stages.stage import Stage
from lowrank_compress.strict import Strict


def extend(
    run: Run,
    stage: Stage,
    config: Strict,
    reporter: Reporter | None = None,
    *,
    resources: Resources = Resources(),
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> Manifest:
    """Let a stage make the next checkpoint of a run, which is the final one from then on.

    A stage that is in the chain already starts from what it started from then.

    Parameters
    ----------
    run
        Where; locked by the caller.
    stage, config
        What to do.
    reporter
        Told about progress and warnings.
    resources
        What it may use; its processes are all called with the same.
    overwrite
        Replace another result of this stage.
    trust_remote_code
        Allow code shipped with the dense original to run.

    Raises
    ------
    LrcError
        The run has no checkpoint yet, a stage before it has another result now than its chain says, or the dense
        original is needed and gone or changed.
    """
    reporter = reporter or Silent()
    resources.workers.once(lambda: sweep(run.path))
    before = run.finished(before=stage.name)
    dense = original_of(before.index, str(run.path), trust_remote_code) if stage.needs_dense else None
    inputs = stage.inputs(Checkpoint(before.path), before.manifest.report, dense)
    directory = before.index.directory(stage.name, stage.directory)
    meter = Meter(reporter)
    manifest = stage.run(config, inputs, run.path / directory, meter, resources=resources, overwrite=overwrite)
    link = Link(stage.name, directory, manifest.id)

    def keep() -> None:
        record(run, before.index, [link], reporter)
        keep_cost(run, stage.command, meter.cost())

    resources.workers.once(keep)
    return manifest


def record(run: Run, index: Index, links: Sequence[Link], reporter: Reporter) -> None:
    """Write down in run.json that stages of the chain have these results, and warn of what was made from others."""
    extended = index
    for link in links:
        extended = extended.extended(link)
    write_index(run.index, extended)
    for old in index.chain:
        if old.stage not in [each.stage for each in extended.chain]:
            reporter.warn(
                f"{run.path / old.directory} was made from another result and no longer belongs to the run. Repeat "
                f"`lrc {old.stage}` with --overwrite."
            )


def original_of(index: Index, target: str, trust_remote_code: bool = False) -> Checkpoint:
    """Find the dense checkpoint that a run was made from.

    Raises
    ------
    LrcError
        It is gone, or was changed since.
    """
    dense = Checkpoint(locate(index.base, index.revision, trust_remote_code), trust_remote_code)
    if checkpoint_id(dense) != index.base_id:
        raise ArtifactError(
            f"{index.base} is not the checkpoint that {target} was made from: its files have changed since. Restore "
            "it, or work on the compressed checkpoint by itself."
        )
    return dense


def beside(
    checkpoint: Path,
    stage: Stage,
    config: Strict,
    out: Path,
    reporter: Reporter | None = None,
    *,
    dense: Checkpoint | None = None,
    resources: Resources = Resources(),
    overwrite: bool = False,
) -> Manifest:
    """Let a stage make a checkpoint of its own from any checkpoint of ours.

    Parameters
    ----------
    checkpoint
        What it starts from.
    out
        The directory of the new one.
    dense
        The dense original, for a stage that looks at it.
    stage, config, reporter, resources, overwrite
        As for `extend`.

    Raises
    ------
    LrcError
        The checkpoint cannot be used, or something else is in `out`.
    """
    resources.workers.once(lambda: _refuse_foreign(out, stage))
    manifest = read_manifest(checkpoint)
    inputs = stage.inputs(Checkpoint(checkpoint), None if manifest is None else manifest.report, dense)
    return stage.run(config, inputs, out, reporter, resources=resources, overwrite=overwrite)


def _refuse_foreign(out: Path, stage: Stage) -> None:
    """Refuse to put a checkpoint among files that are no result of the stage."""
    recover(out, listed)
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise InputError(f"--out {out} is a file or a link; expected a directory, existing or not.")
    if out.exists() and any(out.iterdir()):
        found = read_manifest(out)
        if found is None or found.key.stage != stage.name:
            raise ArtifactError(
                f"{out} is not empty and holds no result of `lrc {stage.command}`. Choose another directory with --out."
            )
