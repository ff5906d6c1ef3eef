"""Compare a run's files with what its manifests say was written."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path

from lowrank_compress.artifacts.documents import read_json
from lowrank_compress.artifacts.manifest import MANIFEST, Manifest, altered, read_manifest
from lowrank_compress.errors import ArtifactError
from lowrank_compress.shipped.config import REMOTE_FILE
from lowrank_compress.stages.evaluate import METRICS, merged
from lowrank_compress.stages.index import Link, read_index
from lowrank_compress.stages.refresh import code_of
from lowrank_compress.stages.run import Run, recipe_state, strangers
from lowrank_compress.stages.stage import Stage
from lowrank_compress.stages.table import STAGES, in_order

UPSTREAM = {"calibration": "calibrate", "scores": "score"}
"""Inputs of results that are the id of another stage's in the same run: the input's name, and the stage."""


def verify(path: Path) -> list[dict[str, str]]:
    """Check every file of a run.

    Returns
    -------
    list of dict
        ``stage``, ``file``, ``state``: "intact", "missing or altered", "damaged manifest", "of another result",
        "not of this checkpoint" (but loaded with it), "edited by hand" (the recipe, or ranks.json that parses and
        fits), "not there yet", "dropped" (statistics), "older code" and "newer code" (the checkpoint's copy of the
        model code, as it was written by another version of this package).

    Raises
    ------
    ArtifactError
        The directory is no run.
    """
    run = Run(path)
    run.require()
    state = "intact" if recipe_state(run.recipe) == "ours" else "edited by hand"
    findings = [{"stage": "recipe", "file": run.recipe.name, "state": state}]
    chain = _chain(run)
    for stage in in_order():
        for directory in _results(run, stage, chain):
            findings += _verify_result(run, stage, directory, chain)
    findings += _verify_file("factorize", run.index, _index_is_intact(run))
    metrics = run.evaluations / METRICS
    return findings + _verify_file("eval", metrics, metrics.exists() and _reads(metrics) == merged(run.evaluations))


def verify_checkpoint(directory: Path) -> list[dict[str, str]]:
    """Check the files of a checkpoint that is in no run, against the manifest that it carries.

    Returns
    -------
    list of dict
        As `verify`.

    Raises
    ------
    ArtifactError
        It carries none, or a damaged one.
    """
    manifest = read_manifest(directory)
    if manifest is None:
        raise ArtifactError(f"{directory} is neither a run nor a checkpoint with a {MANIFEST} of this program.")
    return _verify_files(STAGES[manifest.key.stage], directory, manifest, "", lambda name: False)


def _chain(run: Run) -> tuple[Link, ...]:
    """The links of run.json; none where it cannot be read, of which there is a finding of its own."""
    try:
        return read_index(run.index).chain
    except ArtifactError:
        return ()


def _results(run: Run, stage: Stage, chain: Sequence[Link]) -> list[Path]:
    """Name the directories in which a stage has, or is to have, a result."""
    own = next((link.directory for link in chain if link.stage == stage.name), stage.directory)
    directory = run.path / own
    if stage.writes == "measurements":
        return [path for path in sorted(directory.glob("*")) if path.is_dir()]
    asked = not stage.changes_weights or stage.name in [link.stage for link in chain]
    return [directory] if asked or directory.exists() else []


def _verify_file(stage: str, path: Path, intact: bool) -> list[dict[str, str]]:
    """Report on a file that no manifest lists; it says nothing that others do not."""
    if not path.exists():
        return []
    where = path.name if stage == "factorize" else f"{path.parent.name}/{path.name}"
    return [{"stage": stage, "file": where, "state": "intact" if intact else "missing or altered"}]


def _reads(path: Path) -> object:
    try:
        return read_json(path)
    except ArtifactError:
        return None


def _index_is_intact(run: Run) -> bool:
    """Whether run.json is as it was written, and of the model that is there."""
    try:
        run.finished(names=())
    except ArtifactError:
        return False
    return True


def _verify_result(run: Run, stage: Stage, directory: Path, chain: Sequence[Link]) -> list[dict[str, str]]:
    where = str(directory.relative_to(run.path))

    def finding(file: str, state: str) -> dict[str, str]:
        return {"stage": stage.command, "file": file, "state": state}

    try:
        manifest = read_manifest(directory)
    except ArtifactError:
        return [finding(f"{where}/{MANIFEST}", "damaged manifest")]
    if manifest is None:
        return [finding(where, "not there yet")]
    if not _belongs(stage, directory, manifest, chain) or not _follows(run, manifest):
        return [finding(f"{where}/{MANIFEST}", "of another result")]
    return _verify_files(
        stage,
        directory,
        manifest,
        f"{where}/",
        lambda name: name in stage.editable and stage.editable[name](run, directory / name, manifest),
    )


def _verify_files(
    stage: Stage, directory: Path, manifest: Manifest, inside: str, edited: Callable[[str], bool]
) -> list[dict[str, str]]:
    """Report on each file of a result; `inside` is written before their names."""

    def finding(file: str, state: str) -> dict[str, str]:
        return {"stage": stage.command, "file": file, "state": state}

    wrong = set(altered(directory, manifest, remember=False))
    findings = []
    for name in manifest.outputs:
        state = "missing or altered" if name in wrong else "intact"
        if name in wrong and edited(name):
            state = "edited by hand"
        elif name == REMOTE_FILE and state == "intact" and (code := code_of(directory, manifest)) != "ours":
            state = code
        findings.append(finding(f"{inside}{name}", state))
    if stage.writes == "checkpoint":
        findings += [finding(f"{inside}{name}", "not of this checkpoint") for name in strangers(directory, manifest)]
    if manifest.report.get("kept") is False:
        findings.append(finding(inside.rstrip("/"), "dropped"))
    return findings


def _follows(run: Run, manifest: Manifest) -> bool:
    """Whether a result was made from what the stages before it have in the run now, where that is there."""
    for name, before in UPSTREAM.items():
        made_from = manifest.key.inputs.get(name)
        with contextlib.suppress(ArtifactError):  # of which there is a finding of its own
            there = read_manifest(run.path / STAGES[before].directory)
            if made_from is not None and there is not None and there.id != made_from:
                return False
    return True


def _belongs(stage: Stage, directory: Path, manifest: Manifest, chain: Sequence[Link]) -> bool:
    """Whether a result is one of the stage, and of what the run has come to."""
    if manifest.key.stage != stage.name:
        return False
    if stage.writes == "measurements":
        return manifest.id == directory.name
    # What was made from a checkpoint that the run has no longer is a leftover.
    return not (stage.changes_weights and chain) or Link(stage.name, directory.name, manifest.id) in chain
