"""Bodies of the commands: resolve the options, lock the run, call the stages, print."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import typer
from pydantic import ByteSize, TypeAdapter, ValidationError

from lowrank_compress.artifacts.directories import refuse_unsafe
from lowrank_compress.artifacts.documents import read_json
from lowrank_compress.artifacts.files import sha256
from lowrank_compress.artifacts.lock import locked
from lowrank_compress.artifacts.manifest import Manifest, read_manifest
from lowrank_compress.calibration.workers import Workers, workers_of
from lowrank_compress.cli.terminal import TerminalReporter, console
from lowrank_compress.config import EvaluateConfig, Recipe, load_recipe
from lowrank_compress.demo import text as demo_text
from lowrank_compress.errors import ArtifactError, CalibrationError, InputError
from lowrank_compress.model.checkpoint import Checkpoint
from lowrank_compress.model.dense import write_dense
from lowrank_compress.model.layers import REMOTE_FILE
from lowrank_compress.model.locate import locate
from lowrank_compress.model.memory import keep_freed
from lowrank_compress.stages import calibrate as calibrate_stage
from lowrank_compress.stages import pipeline
from lowrank_compress.stages import score as score_stage
from lowrank_compress.stages.environment import compute_device
from lowrank_compress.stages.meter import Meter
from lowrank_compress.stages.plan import Plan, make_plan
from lowrank_compress.stages.reach import check_ratio
from lowrank_compress.stages.refresh import checkpoint_of
from lowrank_compress.stages.refresh import refresh as refresh_code
from lowrank_compress.stages.run import Run
from lowrank_compress.stages.sizing import dry_run as plan_sizes
from lowrank_compress.stages.sizing import roomy


def device_name(device: str | None) -> str:
    """Resolve the device option."""
    return str(compute_device(device or "auto"))


def _budget(size: str | None) -> int | None:
    """Read a memory budget such as 8GB or 512MiB.

    Raises
    ------
    InputError
        It is none.
    """
    if size is None:
        return None
    try:
        return int(TypeAdapter(ByteSize).validate_python(size))
    except ValidationError:
        raise InputError(f"--memory-budget {size} is no size; expected a number of bytes, or one like 8GB.") from None


def compress(
    recipe: Recipe,
    out: Path | None,
    memory_budget: str | None,
    keep_statistics: bool,
    overwrite: bool,
    reporter: TerminalReporter,
) -> dict[str, Any]:
    """Run the whole pipeline but the evaluation."""
    memory = _budget(memory_budget)
    plan = make_plan(recipe)
    check_ratio(plan.score, plan.checkpoint)
    run = Run(out or pipeline.default_run(recipe))
    pipeline.refuse_foreign(run)
    _tell(plan, reporter)
    with _working(run) as workers:
        if roomy(plan, memory, workers.count):
            keep_freed()
        workers.once(lambda: pipeline.claim(run, plan, overwrite=overwrite))
        meter = Meter(reporter)
        manifest = pipeline.compress(
            plan,
            run,
            meter,
            memory=memory,
            workers=workers,
            keep_statistics=keep_statistics,
            overwrite=overwrite,
        )
    return _result(run, manifest) | {"cost": meter.cost()}


@contextmanager
def _working(run: Run | None) -> Iterator[Workers]:
    """Join the processes that torchrun started, if it did, and lock the run directory they work in, if there is one.

    The result is for the first to print; the others end here.
    """
    with workers_of() as workers, locked(run.path) if run is not None and workers.is_first else nullcontext():
        yield workers
    if not workers.is_first:
        raise typer.Exit


def _tell(plan: Plan, reporter: TerminalReporter) -> None:
    for note in plan.notes:
        reporter.warn(note)


def _result(run: Run, manifest: Manifest) -> dict[str, Any]:
    return {"run": str(run.path), "model": str(run.model), "id": manifest.id, **manifest.report}


def calibrate(
    recipe: Recipe, out: Path | None, memory_budget: str | None, overwrite: bool, reporter: TerminalReporter
) -> dict[str, Any]:
    """Run the first stage."""
    memory = _budget(memory_budget)
    plan = make_plan(recipe)
    run = Run(out or pipeline.default_run(recipe))
    pipeline.refuse_foreign(run)
    _tell(plan, reporter)
    with _working(run) as workers:
        if roomy(plan, memory, workers.count):
            keep_freed()
        workers.once(lambda: pipeline.claim(run, plan, overwrite=overwrite))
        manifest = calibrate_stage.run(
            plan.calibrate,
            calibrate_stage.Inputs(plan.checkpoint),
            run.statistics,
            reporter,
            memory=memory,
            workers=workers,
            overwrite=overwrite,
        )
    return {"run": str(run.path), "stage": "calibrate", "id": manifest.id, **manifest.report}


def _changed_plan(run: Run, given: dict[str, Any]) -> Plan:
    """The plan of an existing run with some options changed; the run's recipe follows."""
    run.require()
    return make_plan(load_recipe(run.recipe, given), reads_text=False)


def score(path: Path, given: dict[str, Any], overwrite: bool, reporter: TerminalReporter) -> dict[str, Any]:
    """Run the second stage on an existing run."""
    run = Run(path)
    plan = _changed_plan(run, given)
    with _working(run) as workers:
        inputs = pipeline.inputs_of_score(plan, run)
        manifest = score_stage.run(plan.score, inputs, run.scores, reporter, workers=workers, overwrite=overwrite)
        workers.once(lambda: pipeline.claim(run, plan, overwrite=True))
    return {"run": str(run.path), "stage": "score", "id": manifest.id, **manifest.report}


def factorize(path: Path, given: dict[str, Any], overwrite: bool, reporter: TerminalReporter) -> dict[str, Any]:
    """Run the third stage on an existing run."""
    run = Run(path)
    plan = _changed_plan(run, given)
    with _working(run) as workers:
        manifest = pipeline.finish(plan, run, reporter, workers=workers, overwrite=overwrite)
        # Another storage than the ranks were chosen for is no recipe: it would choose other ranks.
        changed = _changed_plan(run, {name: given[name] for name in ("dtype", "trust_remote_code")})
        workers.once(lambda: pipeline.claim(run, changed, overwrite=True))
    return _result(run, manifest)


def evaluate(target: str, config: EvaluateConfig, force: bool, reporter: TerminalReporter) -> dict[str, Any]:
    """Run the fourth stage on a run or a checkpoint."""
    run = Run(Path(target))
    for made_by in (run, Run(Path(target).parent)):  # a run, or the checkpoint inside one
        if made_by.exists() and made_by.index.exists() and not force:
            _refuse_calibration_text(made_by, config)
    with _working(run if run.exists() else None) as workers:
        return pipeline.evaluate_target(target, config, reporter, workers=workers)


def _refuse_calibration_text(run: Run, config: EvaluateConfig) -> None:
    recipe = load_recipe(run.recipe, {})
    calibrated = read_manifest(run.statistics)
    used = recipe.calibration if calibrated is not None and calibrated.report["tokens"] else None
    for name in (*config.perplexity, *([config.classification] if config.classification else [])):
        same = used == name
        if used and not same and Path(used).is_file() and Path(name).is_file():
            same = sha256(Path(used)) == sha256(Path(name))
        if same:
            raise CalibrationError(
                f"{name} is the text that this run was calibrated on: measured on it, the compressed model looks "
                "better than it is. Evaluate on another text, or pass --force."
            )


def export_dense(target: str, out: Path, overwrite: bool, reporter: TerminalReporter) -> None:
    """Write the dense checkpoint of compressed weights."""
    run = Run(Path(target))
    is_run = run.exists()
    final = run.finished() if is_run else None
    source = Checkpoint(final.path if final else locate(target))
    precious = {"the_compressed_checkpoint": source.path}
    if final is not None:
        base = Path(final.index["base"])
        precious |= {"its_original": base} if base.is_dir() else {}
        precious |= {f"the_run's_{path.name}": path for path in run.parts}
    refuse_unsafe(out, "--dense", **precious)
    write_dense(source, out, lambda done, total: reporter.advance("export", done, total), overwrite=overwrite)
    console().print(f"Dense checkpoint: {out}")


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
    return plan_sizes(plan, Run(out or pipeline.default_run(recipe)), _budget(memory_budget))


def demo(ratio: float, out: Path, reporter: TerminalReporter) -> list[dict[str, Any]]:
    """Compress the embedded model by plain svd, fwsvd and auto, and evaluate on held-out text."""
    given: dict[str, Any] = {"model": str(Path(demo_text.__file__).parent / "model"), "ratio": ratio}
    # Of the three the one that reaches the least, and needs no text.
    plan = make_plan(load_recipe(None, given | {"method": "svd"}))
    check_ratio(plan.score, plan.checkpoint)
    methods = ("svd", "fwsvd", "auto")
    for method in methods:
        pipeline.refuse_foreign(Run(out / f"{method}-{ratio:g}"))
    texts = demo_text.write_parts(out / "text")
    rows = []
    for method in methods:
        recipe = load_recipe(None, given | {"method": method, "calibration": str(texts["calibration"]), "samples": 256})
        run = Run(out / f"{method}-{ratio:g}")
        plan = make_plan(recipe)
        with locked(run.path):
            pipeline.claim(run, plan, overwrite=False)
            manifest = pipeline.compress(plan, run, reporter)
            config = EvaluateConfig(perplexity=(str(texts["heldout"]),), device=plan.device)
            metrics = pipeline.evaluate_target(str(run.path), config, reporter)
        (values,) = metrics["perplexity"].values()
        rows.append(
            {"method": method, "run": str(run.path), **manifest.report, "size": metrics["size"], "perplexity": values}
        )
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
