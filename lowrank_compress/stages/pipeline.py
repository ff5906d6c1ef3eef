"""The stages in a row, over a run directory, as a recipe asks for them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lowrank_compress.artifacts.directories import keep_aside
from lowrank_compress.artifacts.files import sweep, write_text
from lowrank_compress.artifacts.manifest import Key, Manifest, difference
from lowrank_compress.artifacts.tensors import BlockFiles
from lowrank_compress.config import EvaluateConfig
from lowrank_compress.errors import ArtifactError, InputError
from lowrank_compress.methods.parts import own_methods
from lowrank_compress.methods.scheme import DENSE
from lowrank_compress.model.checkpoint import Checkpoint
from lowrank_compress.model.locate import locate
from lowrank_compress.recipe import Recipe
from lowrank_compress.recipefile import read_recipe_file
from lowrank_compress.resources.resources import Resources
from lowrank_compress.stages import calibrate, score
from lowrank_compress.stages.chain import original_of, record
from lowrank_compress.stages.decompose import Bases
from lowrank_compress.stages.identity import checkpoint_id, display_name
from lowrank_compress.stages.index import Index, Link, read_index
from lowrank_compress.stages.inputs import inputs_of_score, quantize_of
from lowrank_compress.stages.maps import COSTS
from lowrank_compress.stages.plan import Plan
from lowrank_compress.stages.reporting import Reporter, Silent
from lowrank_compress.stages.run import Run, recipe_state, recipe_text
from lowrank_compress.stages.sinks import Keeping, Sink
from lowrank_compress.stages.sizing import beyond
from lowrank_compress.stages.stage import Given, Stage
from lowrank_compress.stages.table import STAGES, directories


def default_run(recipe: Recipe) -> Path:
    """Where a run goes without ``--out``: runs/<model>-<method>-<ratio>, with methods of single parts and the cache."""
    parts = [recipe.method, *(f"{name}-{method}" for name, method in own_methods(recipe).items())]
    named = "-".join(re.sub(r"[^\w.-]+", "+", part) for part in parts)
    cache = "" if recipe.kv_ratio is None else f"-kv{recipe.kv_ratio:g}"
    window = f"-w{recipe.kv_window}" if cache and recipe.kv_window else ""
    ratio = "" if recipe.method == DENSE else f"-{recipe.ratio:g}"
    if recipe.bytes is not None:
        ratio = f"-bytes-{recipe.bytes:g}" + (f"-{recipe.mix}" if recipe.mix not in (None, "auto") else "")
    return Path("runs") / f"{display_name(recipe.model).replace('/', '--')}-{named}{ratio}{cache}{window}"


def claim(run: Run, plan: Plan, *, overwrite: bool) -> None:
    """Make a run directory this recipe's, or find that it is.

    A recipe that says the same stays as it is, comments and all; one that was edited and says something else is kept as
    recipe.yaml.bak.

    Raises
    ------
    ArtifactError
        It holds something else, or the run of another recipe.
    """
    refuse_foreign(run)
    for directory in (run.path, *directories(run)):
        sweep(directory)
    mine = plan.resolved()
    state = recipe_state(run.recipe)
    if state != "none":
        there, asked = read_recipe_file(run.recipe), mine.settings()
        there.pop("trust_remote_code", None)
        if there == asked:
            return
        if run.begun() and not overwrite:
            raise ArtifactError(
                f"{run.path} is the run of another recipe: {difference(there, asked)}. Choose another directory with "
                "--out, or pass --overwrite to replace it."
            )
    if state == "edited":
        keep_aside(run.recipe)
    write_text(run.recipe, recipe_text(mine))


def refuse_foreign(run: Run) -> None:
    """Refuse a directory that is something else, before anything is put into it.

    Raises
    ------
    ArtifactError, InputError
        It is a file, or holds files but no recipe that this program wrote.
    """
    if not str(run.path).isprintable():
        # Weights are read and written by a library that takes UTF-8 names alone.
        raise InputError(f"--out {str(run.path)!r} has characters that cannot be printed. Choose another name.")
    if run.path.exists() and not run.path.is_dir():
        raise InputError(f"--out {run.path} is a file; expected a directory, existing or not.")
    state = recipe_state(run.recipe)
    if state == "foreign":
        raise ArtifactError(
            f"{run.recipe} is no recipe of a run (or of one made by an older version of this program); it is not "
            "replaced. Choose another directory with --out. A recipe of your own is given with --config."
        )
    if state == "none" and run.begun():
        raise ArtifactError(
            f"{run.path} is not empty and is no run of this program. Choose another directory with --out."
        )


def compress(
    plan: Plan,
    run: Run,
    reporter: Reporter | None = None,
    *,
    resources: Resources = Resources(),
    keep_statistics: bool = False,
    overwrite: bool = False,
) -> Manifest:
    """Calibrate, score and factorize; a block's statistics are scored as soon as they are complete and then dropped.

    Parameters
    ----------
    plan
        What to do.
    run
        Where; claimed and locked by the caller.
    reporter
        Told about progress and warnings.
    resources
        What this process may use, and those that do this together with it, all called with the same.
    keep_statistics
        Keep them in ``stats/``; the result is the same, byte for byte.
    overwrite
        Replace other results.
    """
    reporter, workers = reporter or Silent(), resources.workers
    inputs = inputs_of_score(plan, run)
    scores = score.key(plan.score, inputs)
    found = workers.once(lambda: score.committed_scores(run.scores, scores, overwrite=overwrite))
    if found is not None and keep_statistics and not calibrate.kept(run.statistics, inputs.calibration):
        reporter.warn(
            "The run has its scores already, so no statistics are taken that could be kept. `lrc calibrate` with the "
            "same recipe takes and keeps them."
        )
    if found is None:
        if said := beyond(plan, resources):
            reporter.warn(said)
        keep_statistics = keep_statistics or workers.once(lambda: calibrate.kept(run.statistics, inputs.calibration))
        bases = Bases(plan.chooser, inputs.calibration.id, run.scores, resources=resources)
        step(
            STAGES["calibrate"],
            plan,
            run,
            reporter,
            sink=None if keep_statistics else _keeping(plan, run, bases, inputs.calibration),
            resources=resources,
            overwrite=overwrite,
        )
        step(STAGES["score"], plan, run, reporter, bases=bases, resources=resources, overwrite=overwrite)
    return finish(plan, run, reporter, resources=resources, overwrite=overwrite)


def _keeping(plan: Plan, run: Run, bases: Bases, calibration: Key) -> Sink:
    """Where statistics go: to the bases, and those of gradients to what `refine` will look for them in."""
    if plan.refine is None or not plan.calibrate.held_out:
        return bases
    return Keeping(bases, _gradients(run, calibration), COSTS)


def _gradients(run: Run, calibration: Key) -> BlockFiles:
    return BlockFiles(run.work, calibration.id, "fisher")


def finish(
    plan: Plan,
    run: Run,
    reporter: Reporter | None = None,
    *,
    statistics: Path | None = None,
    resources: Resources = Resources(),
    overwrite: bool = False,
) -> Manifest:
    """Factorize, refine where the recipe says so, and name the final checkpoint in run.json.

    Whatever the recipe, its result is ``model``; what is refined or stored in few bits is kept beside it.

    Parameters
    ----------
    plan, run, reporter, resources, overwrite
        As for `compress`.
    statistics
        Where those of the calibration may be, if not in the run.
    """
    quantize = quantize_of(plan)
    stage, place = STAGES["factorize"], run.model if plan.refine is None else run.unrefined
    place = place if quantize is None else run.unquantized
    inputs = stage.inputs(plan, run)
    manifest = stage.run(plan.factorize, inputs, place, reporter, resources=resources, overwrite=overwrite)
    links = [Link(stage.name, place.name, manifest.id)]
    if plan.refine is not None:
        stage = STAGES["refine"]
        given = Given(Checkpoint(place), manifest.report, plan.checkpoint)
        calibration = inputs_of_score(plan, run).calibration
        kept = _gradients(run, calibration)
        # A calibration that is held out takes them as `refine` does.
        known = BlockFiles(statistics or run.statistics, calibration.id)
        gradients = (kept, known) if plan.calibrate.held_out else ()
        manifest = stage.run(
            plan.refine, given, run.model, reporter, gradients=gradients, resources=resources, overwrite=overwrite
        )
        resources.workers.once(lambda: kept.remove(plan.subject.scopes))
        links.append(Link(stage.name, run.model.name, manifest.id))
    if quantize is not None:
        stage = STAGES["quantize"]
        given = Given(Checkpoint(place), manifest.report)
        manifest = stage.run(quantize, given, run.model, reporter, resources=resources, overwrite=overwrite)
        links.append(Link(stage.name, run.model.name, manifest.id))
    resources.workers.once(lambda: _begin_chain(plan, run, links, reporter or Silent()))
    return manifest


def _begin_chain(plan: Plan, run: Run, links: Sequence[Link], reporter: Reporter) -> None:
    """Write run.json; what later stages made from this very checkpoint stays in it."""
    try:
        chain = read_index(run.index).chain
    except ArtifactError:
        chain = ()
    if links[0].stage not in [each.stage for each in chain]:
        chain = ()
    base, revision = plan.resolved().model, plan.recipe.revision
    record(run, Index(base, revision, checkpoint_id(plan.checkpoint), chain), links, reporter)


def step(
    stage: Stage,
    plan: Plan,
    run: Run,
    reporter: Reporter | None = None,
    *,
    resources: Resources = Resources(),
    overwrite: bool = False,
    **more: Any,
) -> Manifest:
    """Run a stage of the recipe; `more` are options of its own."""
    (config,) = (one for one in (plan.calibrate, plan.score, plan.factorize) if isinstance(one, stage.config))
    inputs, out_dir = stage.inputs(plan, run), run.path / stage.directory
    return stage.run(config, inputs, out_dir, reporter, resources=resources, overwrite=overwrite, **more)


def evaluation_inputs(target: str, trust_remote_code: bool) -> tuple[Given, Path | None]:
    """What to evaluate for a target, and where to keep it: a run with its dense original, or any checkpoint.

    Raises
    ------
    LrcError
        The target is neither, the run is unfinished, or its original is gone or changed.
    """
    run = Run(Path(target))
    if not run.exists():
        return Given(Checkpoint(locate(target, None, trust_remote_code), trust_remote_code)), None
    final = run.finished()
    dense = original_of(final.index, target, trust_remote_code)
    return Given(Checkpoint(final.path), final.manifest.report, dense), run.evaluations


def evaluate_target(
    target: str, config: EvaluateConfig, reporter: Reporter | None = None, *, resources: Resources = Resources()
) -> Manifest:
    """Evaluate a run or a checkpoint; the manifest's report holds the measurements."""
    inputs, out_dir = evaluation_inputs(target, config.trust_remote_code)
    return STAGES["evaluate"].run(config, inputs, out_dir, reporter, resources=resources)
