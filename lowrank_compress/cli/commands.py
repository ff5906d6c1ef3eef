"""Bodies of the commands: resolve the options, lock the run, call the stages, print."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import yaml
from rich.progress import filesize

from lowrank_compress.artifacts.files import read_json, sha256
from lowrank_compress.artifacts.lock import locked
from lowrank_compress.artifacts.manifest import Manifest
from lowrank_compress.cli.terminal import TerminalReporter, console, messages, number, print_json, table
from lowrank_compress.config import EvaluateConfig, Recipe, load_recipe
from lowrank_compress.demo import text as demo_text
from lowrank_compress.errors import ArtifactError, CalibrationError, InputError
from lowrank_compress.model.checkpoint import Checkpoint
from lowrank_compress.model.dense import write_dense
from lowrank_compress.stages import calibrate as calibrate_stage
from lowrank_compress.stages import pipeline
from lowrank_compress.stages import score as score_stage
from lowrank_compress.stages.common import Run, compute_device
from lowrank_compress.stages.sizing import dry_run as plan_sizes


def device_name(device: str | None) -> str:
    """Resolve the device option."""
    return str(compute_device(device or "auto"))


def compress(
    recipe: Recipe, out: Path | None, keep_statistics: bool, overwrite: bool, reporter: TerminalReporter
) -> dict[str, Any]:
    """Run the whole pipeline but the evaluation."""
    plan = pipeline.plan(recipe)
    run = Run(out or pipeline.default_run(recipe))
    _refuse_foreign(run)
    with locked(run.path):
        pipeline.claim(run, plan, overwrite=overwrite)
        manifest = pipeline.compress(plan, run, reporter, keep_statistics=keep_statistics, overwrite=overwrite)
    return _result(run, manifest)


def _refuse_foreign(run: Run) -> None:
    """Refuse a directory that is something else before even a lock file is put into it."""
    if run.path.exists() and not run.path.is_dir():
        raise InputError(f"--out {run.path} is a file; expected a directory, existing or not.")
    if not run.recipe.exists() and run.begun():
        raise ArtifactError(
            f"{run.path} is not empty and is no run of this program. Choose another directory with --out."
        )


def _result(run: Run, manifest: Manifest) -> dict[str, Any]:
    return {"run": str(run.path), "model": str(run.final_model()), "id": manifest.id, **manifest.report}


def calibrate(recipe: Recipe, out: Path | None, overwrite: bool, reporter: TerminalReporter) -> dict[str, Any]:
    """Run the first stage."""
    plan = pipeline.plan(recipe)
    run = Run(out or pipeline.default_run(recipe))
    _refuse_foreign(run)
    with locked(run.path):
        pipeline.claim(run, plan, overwrite=overwrite)
        manifest = calibrate_stage.run(
            plan.calibrate, calibrate_stage.Inputs(plan.checkpoint), run.statistics, reporter, overwrite=overwrite
        )
    return {"run": str(run.path), "stage": "calibrate", "id": manifest.id, **manifest.report}


def _changed_plan(run: Run, given: dict[str, Any], overwrite: bool) -> pipeline.Plan:
    """The plan of an existing run with some options changed; the run's recipe follows."""
    if not run.recipe.exists():
        raise ArtifactError(
            f"{run.path} is no run: it has no recipe.yaml. Make one with `lrc calibrate` or `lrc compress`."
        )
    return pipeline.plan(load_recipe(run.recipe, given))


def score(path: Path, given: dict[str, Any], overwrite: bool, reporter: TerminalReporter) -> dict[str, Any]:
    """Run the second stage on an existing run."""
    run = Run(path)
    plan = _changed_plan(run, given, overwrite)
    with locked(run.path):
        manifest = score_stage.run(
            plan.score, pipeline.inputs_of_score(plan, run), run.scores, reporter, overwrite=overwrite
        )
        pipeline.claim(run, plan, overwrite=True)
    return {"run": str(run.path), "stage": "score", "id": manifest.id, **manifest.report}


def factorize(path: Path, given: dict[str, Any], overwrite: bool, reporter: TerminalReporter) -> dict[str, Any]:
    """Run the third stage on an existing run."""
    run = Run(path)
    plan = _changed_plan(run, given, overwrite)
    with locked(run.path):
        manifest = pipeline.finish(plan, run, reporter, overwrite=overwrite)
        pipeline.claim(run, plan, overwrite=True)
    return _result(run, manifest)


def evaluate(target: str, config: EvaluateConfig, force: bool, reporter: TerminalReporter) -> dict[str, Any]:
    """Run the fourth stage on a run or a checkpoint."""
    run = Run(Path(target))
    if run.recipe.exists():
        _refuse_calibration_text(run, config, force)
        with locked(run.path):
            return pipeline.evaluate_target(target, config, reporter)
    return pipeline.evaluate_target(target, config, reporter)


def _refuse_calibration_text(run: Run, config: EvaluateConfig, force: bool) -> None:
    recipe = yaml.safe_load(run.recipe.read_text(encoding="utf-8"))
    used = recipe.get("calibration")
    for name in (*config.perplexity, *([config.classification] if config.classification else [])):
        same = used == name
        if used and not same and Path(used).is_file() and Path(name).is_file():
            same = sha256(Path(used)) == sha256(Path(name))
        if same and not force:
            raise CalibrationError(
                f"{name} is the text that this run was calibrated on: measured on it, the compressed model looks "
                "better than it is. Evaluate on another text, or pass --force."
            )


def export_dense(target: str, out: Path, overwrite: bool, reporter: TerminalReporter) -> None:
    """Write the dense checkpoint of compressed weights."""
    run = Run(Path(target))
    source = Checkpoint(run.final_model() if run.recipe.exists() else Path(target))
    if out.exists() and not out.is_dir():
        raise InputError(f"--dense {out} is a file; expected a directory, existing or not.")
    if out.resolve() in (source.path.resolve(), run.path.resolve()):
        raise InputError(f"--dense {out} is what is to be made dense. Choose another directory.")
    if out.exists() and any(out.iterdir()):
        if not overwrite:
            raise ArtifactError(f"{out} is not empty. Choose another directory, or pass --overwrite to replace it.")
        if not (out / "config.json").exists():
            raise ArtifactError(
                f"{out} is not empty and is no checkpoint; it is not replaced. Choose another directory."
            )
        shutil.rmtree(out)
    write_dense(source, out, lambda done, total: reporter.advance("export", done, total))
    console().print(f"Dense checkpoint: {out}")


def dry_run(recipe: Recipe, out: Path | None, as_json: bool) -> None:
    """Print what a run would need."""
    plan = pipeline.plan(recipe)
    found = plan_sizes(plan, Run(out or pipeline.default_run(recipe)))
    if as_json:
        print_json(found)
        return
    screen = console()
    budget = found["budget"]
    screen.print(
        f"Remove {budget['ratio']:.1%} of {budget['denominator']:,} {budget['ratio_of']} parameters: the "
        f"{budget['claimed_elements']:,} weights inside the blocks may keep {budget['largest_stored']:,} stored "
        "elements."
    )
    ranks = {name: rank for name, rank in found["uniform_ranks"].items()}
    note = " (uniform; the allocator asked for needs the scores)" if found["ranks_need_data"] else ""
    screen.print(
        table(f"Ranks{note}", ["matrix", "rank"], [[name, str(rank or "dense")] for name, rank in ranks.items()])
    )
    for title in ("memory", "disk"):
        rows = [[name, filesize.decimal(size)] for name, size in found[title].items()]
        rows.append(["together", filesize.decimal(sum(found[title].values()))])
        screen.print(table(title.capitalize(), ["what", "size"], rows))
    screen.print("Nothing was written.")


def print_stage(result: dict[str, Any], as_json: bool) -> None:
    """Print what a single stage reports."""
    if as_json:
        print_json(result)
        return
    rows = [[name.replace("_", " "), _plain(value)] for name, value in result.items() if value is not None]
    console().print(table(f"{result['stage']}: done", ["what", "value"], rows))


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def print_result(result: dict[str, Any], as_json: bool) -> None:
    """Print what a finished run reached."""
    if as_json:
        print_json(result)
        return
    console().print(
        f"Removed {result['reached_ratio']:.2%} of the {result['ratio_of']} parameters (asked: "
        f"{result['asked_ratio']:.2%}): {result['claimed_elements']:,} weights became {result['stored_elements']:,} "
        f"stored elements.\nCheckpoint: {result['model']}"
    )
    messages.print(f"Next: lrc eval {result['run']} --perplexity YOUR_TEXT.txt", style="dim", markup=False)


def print_metrics(target: str, metrics: dict[str, Any]) -> None:
    """Print an evaluation, compressed and dense side by side."""
    out = console()
    rows: list[list[str]] = []
    for name, values in metrics["perplexity"].items():
        note = f"{values['tokens']:,} tokens"
        rows.append(
            [f"perplexity · {Path(name).name}", number(values.get("compressed")), number(values.get("dense")), note]
        )
    for name, values in metrics["classification"].items():
        note = f"{values['n']:,} examples"
        rows.append(
            [f"accuracy · {Path(name).name}", number(values.get("compressed")), number(values.get("dense")), note]
        )
    for name, values in metrics["tasks"].items():
        for metric, value in values["dense"].items():
            if "stderr" not in metric:
                error = values["dense"].get(
                    metric.partition(",")[0] + "_stderr,none", values["dense"].get(f"{metric}_stderr")
                )
                compressed = values.get("compressed", {}).get(metric)
                note = "" if error is None else f"± {error:.3g}"
                rows.append([f"{name} · {metric}", number(compressed), number(value), note])
    size = metrics["size"]
    for scope, title in (("blocks", "parameters in blocks"), ("model", "parameters in all")):
        values = size[scope]
        note = f"−{values['ratio']:.2%}" if "ratio" in values else ""
        rows.append(
            [title, f"{values['compressed']:,}" if "compressed" in values else "–", f"{values['dense']:,}", note]
        )
    values = size["bytes"]
    note = f"−{values['ratio']:.2%}" if "ratio" in values else ""
    small = filesize.decimal(values["compressed"]) if "compressed" in values else "–"
    rows.append(["bytes of weights", small, filesize.decimal(values["dense"]), note])
    values = size["kv_bytes_per_token"]
    if values["dense"]:
        rows.append(
            ["KV cache bytes a token", f"{values.get('compressed', values['dense']):,}", f"{values['dense']:,}", ""]
        )
    out.print(table(target, ["", "compressed", "dense", ""], rows))
    if "asked_ratio" in size:
        out.print(
            f"Asked: {size['asked_ratio']:.2%} of the {size['ratio_of']} parameters; reached: "
            f"{size['reached_ratio']:.2%}."
        )


def demo(ratio: float, out: Path, reporter: TerminalReporter) -> list[dict[str, Any]]:
    """Compress the embedded model by plain svd, fwsvd and auto, and evaluate on held-out text."""
    texts = demo_text.write_parts(out / "text")
    rows = []
    for method in ("svd", "fwsvd", "auto"):
        recipe = Recipe(
            model=str(Path(demo_text.__file__).parent / "model"),
            ratio=ratio,
            method=method,
            calibration=str(texts["calibration"]),
            samples=256,
        )
        run = Run(out / f"{method}-{ratio:g}")
        plan = pipeline.plan(recipe)
        with locked(run.path):
            pipeline.claim(run, plan, overwrite=True)
            manifest = pipeline.compress(plan, run, reporter, overwrite=True)
            config = EvaluateConfig(perplexity=(str(texts["heldout"]),), device=plan.device)
            metrics = pipeline.evaluate_target(str(run.path), config, reporter)
        (values,) = metrics["perplexity"].values()
        rows.append(
            {"method": method, "run": str(run.path), **manifest.report, "size": metrics["size"], "perplexity": values}
        )
    return rows


def print_demo(rows: list[dict[str, Any]], as_json: bool) -> None:
    """Print the demo's table."""
    if as_json:
        print_json({"demo": rows})
        return
    size = rows[0]["size"]
    body = [["dense", number(rows[0]["perplexity"]["dense"]), f"{size['blocks']['dense']:,}", "0 %"]]
    body += [
        [
            row["method"],
            number(row["perplexity"]["compressed"]),
            f"{row['size']['blocks']['compressed']:,}",
            f"{row['reached_ratio']:.2%}",
        ]
        for row in rows
    ]
    console().print(f"Perplexity on held-out Python documentation ({rows[0]['perplexity']['tokens']:,} tokens)")
    console().print(table("", ["method", "perplexity", "parameters in blocks", "removed"], body))
    console().print(
        f"The checkpoints are in {Path(rows[0]['run']).parent}; look into one with: lrc show {rows[-1]['run']}"
    )


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
    return read_json(path / "lowrank.json")
