"""Commands that make and measure: `lrc compress`, its stages, and those that follow."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lowrank_compress.cli import options as o
from lowrank_compress.cli.app import app
from lowrank_compress.cli.hub import Hub, Subfolder, Token, pushes, use_token
from lowrank_compress.cli.terminal import friendly, prepare_libraries, print_json, reported
from lowrank_compress.config import EvaluateConfig, evaluate_config
from lowrank_compress.strict import COMMAND_LINE

_BATCH, _SEED = (EvaluateConfig.model_fields[name].default for name in ("batch_size", "seed"))


@app.command()
@o.takes_recipe("compress")
@pushes
def compress(
    given: dict[str, Any],
    hub: Hub,
    out: o.Out = None,
    config: o.Config = None,
    memory_budget: o.MemoryBudget = None,
    keep_statistics: Annotated[
        bool, typer.Option("--keep-statistics", help="Keep the statistics in RUN/stats.", rich_help_panel=o.WHERE)
    ] = False,
    overwrite: o.Overwrite = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Print budget, ranks, memory and disk, and write nothing.", rich_help_panel=o.WHERE
        ),
    ] = False,
    subfolder: Subfolder = None,
    check: o.Check = None,
    tolerance: o.Tolerance = None,
    against: o.ExpectedRun = None,
    report: o.Report = None,
    json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Compress a checkpoint: calibrate, score, factorize, and refine. The result is RUN/model.

    With --check, exit code 0 means the same bytes as expected, 3 the same within --tolerance, 2 anything else.
    """
    with friendly(debug):
        prepare_libraries()
        from lowrank_compress.cli import checking, commands, printing

        recipe = commands.recipe_of(config, given, subfolder)
        checking.refuse_options(check, dry_run=dry_run, overwrite=overwrite, other=(tolerance, against, report))
        hub.check(made=not dry_run and check is None)
        if dry_run:
            printing.print_dry_run(commands.dry_run(recipe, out, memory_budget), json)
            return
        if check is None:
            with reported() as reporter:
                result = commands.compress(recipe, out, memory_budget, keep_statistics, overwrite, reporter)
                hub.push(result["run"], result, json, overwrite, reporter)
            printing.print_result(result, json)
            return
        with reported() as reporter:
            found = checking.check(
                recipe,
                check,
                out,
                tolerance=tolerance,
                against=against,
                report=report,
                compress=lambda place: commands.compress(
                    recipe, place, memory_budget, keep_statistics, False, reporter
                ),
                reporter=reporter,
            )
        checking.show(found, check, json)
    raise typer.Exit(found.exit_code)


@app.command()
@o.takes_recipe("calibrate")
def calibrate(
    given: dict[str, Any],
    out: o.Out = None,
    config: o.Config = None,
    memory_budget: o.MemoryBudget = None,
    overwrite: o.Overwrite = False,
    subfolder: Subfolder = None,
    token: Token = None,
    json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Stage 1: take the statistics that a method needs, block by block, into RUN/stats."""
    with friendly(debug):
        prepare_libraries()
        from lowrank_compress.cli import commands, printing

        with reported() as reporter:
            use_token(token)
            recipe = commands.recipe_of(config, given, subfolder)
            result = commands.calibrate(recipe, out, memory_budget, overwrite, reporter)
        printing.print_stage(result, json)


@app.command()
@o.takes_recipe("score")
def score(
    given: dict[str, Any],
    run: o.RunDir,
    overwrite: o.Overwrite = False,
    json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Stage 2: decompose every matrix and choose ranks, into RUN/scores (ranks.json may be edited by hand)."""
    with friendly(debug):
        prepare_libraries()
        from lowrank_compress.cli import commands, printing

        with reported() as reporter:
            result = commands.score(run, given, overwrite, reporter)
        printing.print_stage(result, json)


@app.command()
@o.takes_recipe("factorize")
def factorize(
    given: dict[str, Any],
    run: o.RunDir,
    overwrite: o.Overwrite = False,
    json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Stage 3: write the compressed checkpoint RUN/model with the ranks that RUN/scores/ranks.json has now."""
    with friendly(debug):
        prepare_libraries()
        from lowrank_compress.cli import commands, printing

        with reported() as reporter:
            result = commands.factorize(run, given, overwrite, reporter)
        printing.print_result(result, json)


@app.command()
@pushes
def cast(
    hub: Hub,
    target: Annotated[str, typer.Argument(help="A run directory or a compressed checkpoint.", show_default=False)],
    dtype: Annotated[str, typer.Option("--dtype", help="float32, bfloat16, float16 or float64", show_default=False)],
    out: Annotated[Path | None, o.new_checkpoint("cast")] = None,
    overwrite: o.Overwrite = False,
    json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Store a compressed checkpoint in another dtype; in a run, the result becomes its final checkpoint."""
    with friendly(debug):
        prepare_libraries()
        from lowrank_compress.cli import commands, printing

        with reported() as reporter:
            hub.check()
            result = commands.follow("cast", target, {"dtype": dtype}, out, overwrite, reporter)
            hub.push(result["model"], result, json, overwrite, reporter)
        printing.print_stage(result, json)


@app.command()
@pushes
def refine(
    hub: Hub,
    target: Annotated[str, typer.Argument(help="A run directory or a compressed checkpoint.", show_default=False)],
    dense: Annotated[
        str | None, typer.Option("--dense", help="The dense original, of a checkpoint that is in no run.")
    ] = None,
    out: Annotated[Path | None, o.new_checkpoint("refine")] = None,
    calibration: Annotated[list[str] | None, o.of_recipe("calibration")] = None,
    text_column: Annotated[list[str] | None, o.of_recipe("text_column")] = None,
    label_column: Annotated[str | None, o.of_recipe("label_column")] = None,
    samples: Annotated[int | None, o.of_recipe("samples")] = None,
    seq_len: Annotated[int | None, o.of_recipe("seq_len")] = None,
    seed: Annotated[int | None, o.of_recipe("seed")] = None,
    device: Annotated[str | None, o.of_recipe("device")] = None,
    trust_remote_code: Annotated[bool | None, o.of_recipe("trust_remote_code")] = None,
    overwrite: o.Overwrite = False,
    json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Fit all matrices anew to what the dense model does on a text: same shapes, other values, less error.

    Closed form, one block of both models in memory. What is not given is as in the run's recipe. On text that no fit
    has seen the result must be nearer to the dense model than before; else the weights stay as they are.
    """
    with friendly(debug):
        prepare_libraries()
        from lowrank_compress.cli import commands, printing

        given = {
            "calibration": calibration or None,
            "text_column": o.joined(text_column),
            "label_column": label_column,
            "samples": samples,
            "seq_len": seq_len,
            "seed": seed,
            "device": device,
            "trust_remote_code": trust_remote_code,
        }
        with reported() as reporter:
            hub.check()
            result = commands.refine(target, given, dense, out, overwrite, reporter)
            hub.push(result["model"], result, json, overwrite, reporter)
        printing.print_stage(result, json)


@app.command("eval")
def evaluate(
    target: Annotated[
        str, typer.Argument(help="A run directory, a checkpoint directory or a hub name.", show_default=False)
    ],
    perplexity: Annotated[
        list[str] | None,
        typer.Option(
            "--perplexity", help="Text to measure perplexity on, of a masked language model too; may be repeated."
        ),
    ] = None,
    classification: Annotated[
        str | None,
        typer.Option(
            "--classification",
            help="Table of labelled examples to measure accuracy on, or F1, or correlations, as the head asks for.",
        ),
    ] = None,
    sts: o.Pairs = None,
    by_position: Annotated[
        bool,
        typer.Option(
            "--by-position",
            help="Also perplexity of tokens 0-31, 32-63, 64-127, … of a window, each by itself: what is far along it "
            "has more context, of which a smaller cache keeps less.",
        ),
    ] = False,
    text_column: Annotated[list[str] | None, o.of_recipe("text_column")] = None,
    label_column: Annotated[str | None, o.of_recipe("label_column")] = None,
    tasks: o.Tasks = None,
    include_path: o.IncludePath = None,
    seq_len: o.WindowLength = None,
    limit: o.Limit = None,
    batch_size: o.BatchSize = _BATCH,
    seed: Annotated[int, typer.Option("--seed", help="Seed of lm-eval, and of masks.")] = _SEED,
    num_fewshot: o.Fewshot = None,
    apply_chat_template: o.ChatTemplate = False,
    device: Annotated[str | None, o.of_recipe("device")] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Evaluate on the calibration file all the same; the result will flatter.")
    ] = False,
    trust_remote_code: Annotated[bool | None, o.of_recipe("trust_remote_code")] = None,
    json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Stage 4: measure perplexity, accuracy, lm-eval tasks and size; for a run, the dense original beside it."""
    with friendly(debug):
        prepare_libraries()
        from lowrank_compress.cli import commands, printing

        config = evaluate_config(
            COMMAND_LINE,
            perplexity=tuple(perplexity or ()),
            classification=classification,
            sts=tuple(sts or ()),
            by_position=by_position,
            text_column=o.joined(text_column),
            label_column=label_column,
            tasks=tuple(name for name in (tasks or "").split(",") if name),
            include_path=None if include_path is None else str(include_path),
            seq_len=seq_len,
            limit=limit,
            batch_size=batch_size,
            seed=seed,
            num_fewshot=num_fewshot,
            apply_chat_template=apply_chat_template,
            device=commands.device_name(device),
            trust_remote_code=bool(trust_remote_code),
        )
        with reported() as reporter:
            metrics = commands.evaluate(target, config, force, reporter)
        if json:
            print_json(metrics)
        else:
            printing.print_metrics(target, metrics)
