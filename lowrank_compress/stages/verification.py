"""Compare a run's files with what its manifests say was written."""

from __future__ import annotations

from pathlib import Path

from lowrank_compress.artifacts.documents import read_json
from lowrank_compress.artifacts.manifest import Manifest, altered, read_manifest
from lowrank_compress.config import Scheme
from lowrank_compress.errors import ArtifactError, LrcError
from lowrank_compress.methods.sites import all_units, sites_of
from lowrank_compress.model.blueprint import blueprint
from lowrank_compress.model.checkpoint import Checkpoint
from lowrank_compress.model.locate import locate
from lowrank_compress.recipe import load_recipe
from lowrank_compress.shipped.config import REMOTE_FILE
from lowrank_compress.stages.bases import bases_of
from lowrank_compress.stages.evaluate import METRICS, merged
from lowrank_compress.stages.ranks import RANKS, read_ranks, require_kept
from lowrank_compress.stages.refresh import code_of
from lowrank_compress.stages.run import Run, recipe_state, strangers


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
    stages = [("calibrate", run.statistics), ("score", run.scores), ("factorize", run.model)]
    stages += [("eval", directory) for directory in sorted(run.evaluations.glob("*")) if directory.is_dir()]
    for stage, directory in stages:
        findings += _verify_stage(run, stage, directory)
    findings += _verify_file("factorize", run.index, _index_is_intact(run))
    metrics = run.evaluations / METRICS
    return findings + _verify_file("eval", metrics, metrics.exists() and _reads(metrics) == merged(run.evaluations))


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


def _verify_stage(run: Run, stage: str, directory: Path) -> list[dict[str, str]]:
    where = str(directory.relative_to(run.path))
    try:
        manifest = read_manifest(directory)
    except ArtifactError:
        return [{"stage": stage, "file": f"{where}/manifest.json", "state": "damaged manifest"}]
    if manifest is None:
        return [{"stage": stage, "file": where, "state": "not there yet"}]
    is_evaluation = stage == "eval"
    if manifest.key.stage != ("evaluate" if is_evaluation else stage) or (
        is_evaluation and manifest.id != directory.name
    ):
        return [{"stage": stage, "file": f"{where}/manifest.json", "state": "of another result"}]
    wrong = set(altered(directory, manifest, remember=False))
    findings = []
    for name in manifest.outputs:
        state = "missing or altered" if name in wrong else "intact"
        if name == RANKS and name in wrong and _fits(run, directory / name, manifest):
            state = "edited by hand"
        elif name == REMOTE_FILE and state == "intact" and (code := code_of(directory, manifest)) != "ours":
            state = code
        findings.append({"stage": stage, "file": f"{where}/{name}", "state": state})
    if stage == "factorize":
        for name in strangers(directory, manifest):
            findings.append({"stage": stage, "file": f"{where}/{name}", "state": "not of this checkpoint"})
    if stage == "calibrate" and not manifest.report.get("kept"):
        findings.append({"stage": stage, "file": where, "state": "dropped"})
    return findings


def _fits(run: Run, ranks: Path, scores: Manifest) -> bool:
    """Whether edited ranks parse, and fit the model and what was kept of its decompositions."""
    try:
        recipe = load_recipe(run.recipe, {})
        resolved = blueprint(Checkpoint(locate(recipe.model, recipe.revision))).resolved
        sites = sites_of(resolved, Scheme(**scores.report["scheme"]))
        choices = read_ranks(ranks, sites)
        units = [unit for unit in all_units(sites) if unit.name in choices]
        require_kept(ranks, units, choices, bases_of(ranks.parent, scores))
    except LrcError:
        return False
    return True
