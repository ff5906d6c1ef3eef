"""Bodies of the commands: resolve the options, lock the run, call the stages, print."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import typer

from lowrank_compress import api
from lowrank_compress.artifacts.directories import refuse_unsafe
from lowrank_compress.artifacts.documents import read_json
from lowrank_compress.artifacts.lock import locked
from lowrank_compress.cli.saying import is_first
from lowrank_compress.cli.terminal import TerminalReporter
from lowrank_compress.config import EvaluateConfig
from lowrank_compress.demo import text as demo_text
from lowrank_compress.errors import ArtifactError, InputError
from lowrank_compress.methods.table import METHODS
from lowrank_compress.model.checkpoint import Checkpoint
from lowrank_compress.model.locate import in_folder, locate
from lowrank_compress.model.tasks import unit_of_loss
from lowrank_compress.recipe import METHOD, Recipe, load_recipe
from lowrank_compress.resources.memory import bytes_of, keep_freed
from lowrank_compress.resources.resources import Resources
from lowrank_compress.resources.workers import started
from lowrank_compress.shipped.config import REMOTE_FILE
from lowrank_compress.stages import pipeline
from lowrank_compress.stages.chain import beside, extend, original_of
from lowrank_compress.stages.environment import compute_device
from lowrank_compress.stages.index import read_index
from lowrank_compress.stages.origin import Heard
from lowrank_compress.stages.plan import Plan, make_plan
from lowrank_compress.stages.reach import check_ratio
from lowrank_compress.stages.refresh import checkpoint_of
from lowrank_compress.stages.refresh import refresh as refresh_code
from lowrank_compress.stages.report import REPORT
from lowrank_compress.stages.run import Finished, Run, working
from lowrank_compress.stages.sizing import beyond, roomy
from lowrank_compress.stages.sizing import dry_run as plan_sizes
from lowrank_compress.stages.table import STAGES, directories
from lowrank_compress.strict import COMMAND_LINE, Strict, stage_config


def device_name(device: str | None) -> str:
    """Resolve the device option."""
    return str(compute_device(device or "auto"))


def recipe_beside(target: str) -> Recipe | None:
    """The recipe of a run; None for a checkpoint that is none's."""
    run = Run(Path(target))
    return load_recipe(run.recipe, {}) if run.exists() else None


def recipe_of(config: Path | None, given: dict[str, Any], subfolder: str | None) -> Recipe:
    """Read a recipe as `load_recipe` does, of a checkpoint that may lie in a folder of its model."""
    recipe = load_recipe(config, given)
    return recipe.model_copy(update={"model": in_folder(recipe.model, subfolder)})


def compress(
    recipe: Recipe,
    out: Path | None,
    memory_budget: str | None,
    keep_statistics: bool,
    overwrite: bool,
    reporter: TerminalReporter,
) -> dict[str, Any]:
    """Run the whole pipeline but the evaluation."""
    result = api.run_recipe(
        recipe,
        out,
        memory_budget=memory_budget,
        keep_statistics=keep_statistics,
        overwrite=overwrite,
        reporter=reporter,
        tune_heap=True,
    )
    _the_first_speaks()
    return _shown(result) | {"cost": result.cost}


def _the_first_speaks() -> None:
    """Of several processes that torchrun started, let all but the first end."""
    if started() > 1 and not is_first():
        raise typer.Exit


@contextmanager
def _working(run: Run | None, memory: int | None = None) -> Iterator[Resources]:
    """As `run.working`; the result is for the first to print, the others end here."""
    with working(run, memory) as resources:
        yield resources
    _the_first_speaks()


def _tell(plan: Plan, reporter: TerminalReporter) -> None:
    for note in plan.notes:
        reporter.warn(note)


def _shown(result: api.Result) -> dict[str, Any]:
    return {"run": str(result.run), "model": str(result.path), "id": result.id, **result.report}


def calibrate(
    recipe: Recipe, out: Path | None, memory_budget: str | None, overwrite: bool, reporter: TerminalReporter
) -> dict[str, Any]:
    """Run the first stage."""
    memory = bytes_of(memory_budget)
    plan = make_plan(recipe)
    run = Run(out or pipeline.default_run(recipe))
    pipeline.refuse_foreign(run)
    _tell(plan, reporter)
    with _working(run, memory) as resources:
        if said := beyond(plan, resources):
            reporter.warn(said)
        if roomy(plan, resources):
            keep_freed()
        resources.workers.once(lambda: pipeline.claim(run, plan, overwrite=overwrite))
        stage = STAGES["calibrate"]
        manifest = pipeline.step(stage, plan, run, reporter, resources=resources, overwrite=overwrite)
    return {"run": str(run.path), "stage": "calibrate", "id": manifest.id, **manifest.report}


def _changed_plan(run: Run, given: dict[str, Any]) -> Plan:
    """The plan of an existing run with some options changed; the run's recipe follows."""
    run.require()
    return make_plan(load_recipe(run.recipe, given), reads_text=False)


def score(path: Path, given: dict[str, Any], overwrite: bool, reporter: TerminalReporter) -> dict[str, Any]:
    """Run the second stage on an existing run."""
    run = Run(path)
    plan = _changed_plan(run, given)
    with _working(run) as resources:
        manifest = pipeline.step(STAGES["score"], plan, run, reporter, resources=resources, overwrite=overwrite)
        resources.workers.once(lambda: pipeline.claim(run, plan, overwrite=True))
    found = {"run": str(run.path), "stage": "score", "id": manifest.id, **manifest.report}
    if found["unit"] == "nats":
        found["loss_unit"] = unit_of_loss(plan.subject.model.task, Heard.of(plan.calibrate).paired)
    return found


def factorize(path: Path, given: dict[str, Any], overwrite: bool, reporter: TerminalReporter) -> dict[str, Any]:
    """Run the third stage on an existing run."""
    run = Run(path)
    plan = _changed_plan(run, given)
    with _working(run) as resources:
        manifest = pipeline.finish(plan, run, reporter, resources=resources, overwrite=overwrite)
        # Another storage than the ranks were chosen for is no recipe: it would choose other ranks.
        changed = _changed_plan(run, {name: given[name] for name in ("dtype", "refine", "trust_remote_code")})
        resources.workers.once(lambda: pipeline.claim(run, changed, overwrite=True))
    return _shown(api.result_of(run, manifest))


def follow(
    name: str, target: str, options: dict[str, Any], out: Path | None, overwrite: bool, reporter: TerminalReporter
) -> dict[str, Any]:
    """Run a stage that makes a checkpoint from a checkpoint: in a run, or beside any compressed checkpoint.

    Raises
    ------
    LrcError
        An option cannot be used, the target is neither, or something else is where the checkpoint is to be.
    """
    return followed(name, target, stage_config(STAGES[name].config, COMMAND_LINE, options), out, overwrite, reporter)


def refine(
    target: str,
    given: dict[str, Any],
    dense: str | None,
    out: Path | None,
    overwrite: bool,
    reporter: TerminalReporter,
) -> dict[str, Any]:
    """Run the stage that fits matrices anew; what is not given, a run's recipe says.

    Raises
    ------
    LrcError
        As `follow`; or the dense original is neither known nor given.
    """
    run = Run(Path(target))
    if run.exists() and dense is not None:
        raise InputError("A run knows the dense checkpoint that it was made from: leave --dense out.")
    if not run.exists() and dense is None:
        raise InputError(f"{target} is no run, so that its dense original must be named: pass --dense MODEL.")
    named = {"refine": True} if dense is None else {"refine": True, "model": dense, "method": _method_of(Path(target))}
    plan = make_plan(load_recipe(run.recipe if run.exists() else None, given | named))
    assert plan.refine is not None
    return followed("refine", target, plan.refine, out, overwrite, reporter, plan.checkpoint)


def _method_of(checkpoint: Path) -> str:
    """Name the method that a checkpoint was compressed by, as its report says; the recommendation where none does."""
    report = checkpoint / REPORT
    said = str(read_json(report).get("method", "")).partition(" ")[0] if report.is_file() else ""
    return said if said in METHODS else METHOD


def followed(
    name: str,
    target: str,
    config: Strict,
    out: Path | None,
    overwrite: bool,
    reporter: TerminalReporter,
    dense: Checkpoint | None = None,
) -> dict[str, Any]:
    """Run a stage as `follow` does, with its config and perhaps the dense original."""
    stage, run = STAGES[name], Run(Path(target))
    if run.exists() and out is None:
        trust = dense is not None and dense.trust_remote_code
        with _working(run) as resources:
            manifest = extend(
                run, stage, config, reporter, resources=resources, overwrite=overwrite, trust_remote_code=trust
            )
        place = run.path / read_index(run.index).directory(name, stage.directory)
        return {"run": str(run.path), "stage": name, "id": manifest.id, "model": str(place), **manifest.report}
    if out is None:
        raise InputError(f"{target} is no run, so that the place of the result must be named: pass --out DIRECTORY.")
    final = run.finished() if run.exists() else None
    source = final.path if final else locate(target)
    refuse_unsafe(out, "--out", **precious(source, run, final))
    if dense is None and final is not None and stage.needs_dense:
        dense = original_of(final.index, target)
    with _working(None) as resources:
        manifest = beside(source, stage, config, out, reporter, dense=dense, resources=resources, overwrite=overwrite)
    return {"stage": name, "id": manifest.id, "model": str(out), **manifest.report}


def precious(source: Path, run: Run, final: Finished | None) -> dict[str, Path]:
    """Name what must not be written over where a checkpoint is the source: that, and all of its run."""
    precious = {"the_compressed_checkpoint": source}
    if final is not None:
        base = Path(final.index.base)
        precious |= {"its_original": base} if base.is_dir() else {}
        precious |= {f"the_run's_{path.name}": path for path in directories(run)}
    return precious


def evaluate(target: str, config: EvaluateConfig, force: bool, reporter: TerminalReporter) -> dict[str, Any]:
    """Run the fourth stage on a run or a checkpoint."""
    metrics = api.run_evaluation(target, config, force=force, reporter=reporter)
    _the_first_speaks()
    return metrics


def refresh(target: Path) -> dict[str, Any]:
    """Renew the model code in a checkpoint."""
    run, directory = checkpoint_of(target)
    with locked(run.path) if run is not None else nullcontext():
        written, kept = refresh_code(directory)
    file = str(directory / REMOTE_FILE)
    return {"file": file, "refreshed": written, "kept": None if kept is None else str(kept)}


def dry_run(recipe: Recipe, out: Path | None, memory_budget: str | None) -> dict[str, Any]:
    """Compute what a run would need; write nothing."""
    plan = make_plan(recipe)
    return plan_sizes(plan, Run(out or pipeline.default_run(recipe)), Resources(bytes_of(memory_budget)))


def demo(ratio: float, out: Path, reporter: TerminalReporter) -> list[dict[str, Any]]:
    """Compress the embedded model by plain svd, fwsvd and auto, and evaluate on held-out text."""
    given: dict[str, Any] = {"model": str(Path(demo_text.__file__).parent / "model"), "ratio": ratio}
    # Of the three the one that reaches the least, and needs no text.
    plan = make_plan(load_recipe(None, given | {"method": "svd"}))
    check_ratio(plan.score, plan.subject)
    methods = ("svd", "fwsvd", "auto")
    for method in methods:
        pipeline.refuse_foreign(Run(out / f"{method}-{ratio:g}"))
    texts = demo_text.write_parts(out / "text")
    rows = []
    for method in methods:
        recipe = load_recipe(None, given | {"method": method, "calibration": str(texts["calibration"]), "samples": 256})
        result = api.run_recipe(recipe, out / f"{method}-{ratio:g}", reporter=reporter)
        metrics = api.evaluate(result.run, perplexity=texts["heldout"], reporter=reporter)
        (values,) = metrics["perplexity"].values()
        rows.append(
            {"method": method, "run": str(result.run), **result.report, "size": metrics["size"], "perplexity": values}
        )
    _the_first_speaks()
    return rows


def read_report(path: Path) -> dict[str, Any]:
    """Read lowrank.json of a compressed checkpoint.

    Raises
    ------
    ArtifactError
        The directory is no compressed checkpoint.
    """
    if not (path / "lowrank.json").exists():
        raise ArtifactError(
            f"{path} is no compressed checkpoint: it has no lowrank.json. Pass a run or a checkpoint made by lrc."
        )
    _ = Checkpoint(path).quantization  # complains where it is not of this program
    return read_json(path / "lowrank.json")
