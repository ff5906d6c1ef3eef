"""Commands that judge models: two beside each other, the spectra of one, and what is said of runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lowrank_compress.cli import options as o
from lowrank_compress.cli.app import app
from lowrank_compress.cli.terminal import friendly, prepare_libraries, reported


@app.command()
def compare(
    a: Annotated[
        str, typer.Argument(metavar="A", help="The model to hold against: a run, a checkpoint or a hub name.")
    ],
    b: Annotated[str, typer.Argument(metavar="B", help="The other one, of the same family and tokenizer.")],
    perplexity: Annotated[
        list[str] | None,
        typer.Option("--perplexity", help="Text to compare them on, masked language models too; may be repeated."),
    ] = None,
    classification: Annotated[
        str | None,
        typer.Option(
            "--classification",
            help="Table of labelled examples to compare them on, as their heads read it: labels, words with tags, "
            "answers, preferences, numbers.",
        ),
    ] = None,
    sts: o.Pairs = None,
    text_column: Annotated[list[str] | None, o.of_recipe("text_column")] = None,
    label_column: Annotated[str | None, o.of_recipe("label_column")] = None,
    tasks: o.Tasks = None,
    include_path: o.IncludePath = None,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", help="Text that both continue, greedily; may be repeated.")
    ] = None,
    new_tokens: Annotated[
        int, typer.Option("--new-tokens", min=1, max=10**6, help="Tokens written after each prompt.")
    ] = 32,
    seq_len: o.WindowLength = None,
    limit: o.Limit = None,
    batch_size: o.BatchSize = 8,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the bootstrap and of lm-eval.")] = 0,
    resamples: Annotated[int, typer.Option("--resamples", help="Draws of windows for confidence intervals.")] = 10_000,
    confidence: Annotated[float, typer.Option("--confidence", help="Probability of the intervals.")] = 0.95,
    num_fewshot: o.Fewshot = None,
    apply_chat_template: o.ChatTemplate = False,
    device: Annotated[str | None, o.of_recipe("device")] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Use the text that a run was calibrated on all the same; it flatters.")
    ] = False,
    trust_remote_code: Annotated[bool | None, o.of_recipe("trust_remote_code")] = None,
    json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Hold model B against model A: where they part, by how much, and whether that is more than chance.

    On a text: the perplexity of both and the confidence interval of their ratio (windows drawn with replacement, the
    same for both), the divergence of B's predictions from A's, how often both expect the same token, and the error of
    B's hidden states block by block, one block of each in memory. On labelled examples: each measure of `lrc eval
    --classification` for both, the interval of its difference (examples drawn likewise), the same of the loss, and
    McNemar's test of what only one has right. On pairs of texts, for embedding models: how well the cosines of both
    rank the pairs, and how near B's embeddings are to A's. On tasks: McNemar's test of the questions that only one of
    them has right. On prompts: what each writes, greedily.
    """
    with friendly(debug):
        prepare_libraries()
        from lowrank_compress.cli import contrasting
        from lowrank_compress.config import CompareConfig
        from lowrank_compress.stages import contrast
        from lowrank_compress.stages.environment import compute_device
        from lowrank_compress.strict import COMMAND_LINE, stage_config

        config = stage_config(
            CompareConfig,
            COMMAND_LINE,
            {
                "perplexity": tuple(perplexity or ()),
                "classification": classification,
                "sts": tuple(sts or ()),
                "text_column": o.joined(text_column),
                "label_column": label_column,
                "tasks": tuple(name for name in (tasks or "").split(",") if name),
                "include_path": None if include_path is None else str(include_path),
                "seq_len": seq_len,
                "limit": limit,
                "batch_size": batch_size,
                "seed": seed,
                "resamples": resamples,
                "confidence": confidence,
                "new_tokens": new_tokens,
                "num_fewshot": num_fewshot,
                "apply_chat_template": apply_chat_template,
                "device": str(compute_device(device or "auto")),
                "trust_remote_code": bool(trust_remote_code),
            },
        )
        with reported() as reporter:
            found = contrast.run((a, b), config, prompt or (), force=force, reporter=reporter)
        contrasting.show(found, json)


@app.command()
def diagnose(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A run directory, a checkpoint directory or a hub name.")
    ],
    base: Annotated[
        str | None, typer.Option("--base", help="The model that it was tuned from: look for intruder dimensions.")
    ] = None,
    text: Annotated[
        str | None, typer.Option("--text", help="Text to look at what leaves each block.", show_default=False)
    ] = None,
    text_column: Annotated[list[str] | None, o.of_recipe("text_column")] = None,
    seq_len: Annotated[
        int | None, typer.Option("--seq-len", min=2, help="Tokens a window (default: 512, or the model's longest)")
    ] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, help="Windows of the text.")] = 16,
    top: Annotated[
        int, typer.Option("--top", min=1, help="Leading directions of each matrix that may be intruders.")
    ] = 10,
    epsilon: Annotated[
        float, typer.Option("--epsilon", help="A direction is an intruder below this cosine to all of the base's.")
    ] = 0.5,
    channels: Annotated[
        int, typer.Option("--channels", min=0, help="Pairs of heads, and channels between them, to list; 0: none.")
    ] = 10,
    components: Annotated[
        int, typer.Option("--components", min=1, help="Leading directions of each head to look for channels among.")
    ] = 8,
    device: Annotated[str | None, o.of_recipe("device")] = None,
    trust_remote_code: Annotated[bool | None, o.of_recipe("trust_remote_code")] = None,
    json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Look at the spectra of a model: of its matrices, of what leaves its blocks, and of how its heads talk.

    Of each matrix (a compressed one multiplied out) the stable rank Σσ²/σ₁², the effective rank exp(H(σ/Σσ)) and the
    exponent of its heavy tail; with --base the directions that tuning has put in. With --text, of what leaves each
    block, the matrix entropy and its estimate without an SVD. Of the heads, which read what earlier ones write.
    """
    with friendly(debug):
        prepare_libraries()
        from lowrank_compress.cli import diagnosing
        from lowrank_compress.config import DiagnoseConfig
        from lowrank_compress.stages import diagnosis
        from lowrank_compress.stages.environment import compute_device
        from lowrank_compress.strict import COMMAND_LINE, stage_config

        config = stage_config(
            DiagnoseConfig,
            COMMAND_LINE,
            {
                "base": base,
                "text": text,
                "text_column": o.joined(text_column),
                "seq_len": seq_len,
                "limit": limit,
                "top": top,
                "epsilon": epsilon,
                "channels": channels,
                "components": components,
                "device": str(compute_device(device or "auto")),
                "trust_remote_code": bool(trust_remote_code),
            },
        )
        with reported() as reporter:
            found = diagnosis.run(model, config, reporter)
        diagnosing.show(found, json)


@app.command()
def card(
    run: o.RunDir,
    out: Annotated[
        Path | None,
        typer.Option("--out", parser=o.a_path, metavar="PATH", help="File to write it to (default: print it)"),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that is there.")] = False,
    debug: o.Debug = False,
) -> None:
    """Make the model card of a run with all that `lrc eval` has measured of its checkpoint.

    The README.md in the checkpoint says how it was made; this one has the measurements too, in the form that the hub of
    Hugging Face shows (model-index), and is meant for its page there.
    """
    with friendly(debug):
        prepare_libraries()
        from lowrank_compress.artifacts.files import write_text
        from lowrank_compress.errors import ArtifactError
        from lowrank_compress.stages.presenting import card_of

        text = card_of(run)
        if out is None:
            typer.echo(text, nl=False)
            return
        if out.exists() and not overwrite:
            raise ArtifactError(f"{out} exists. Choose another name, or pass --overwrite to replace it.")
        write_text(out, text)
        typer.echo(f"Model card: {out}", err=True)


@app.command()
def report(
    runs: Annotated[
        list[Path], typer.Argument(parser=o.a_path, metavar="RUN…", help="Finished runs.", show_default=False)
    ],
    out: Annotated[
        Path,
        typer.Option("--out", parser=o.a_path, metavar="PAGE.html", help="The page to write.", show_default=False),
    ],
    text: Annotated[
        str | None,
        typer.Option("--text", help="Text to measure each block on, alone in the place of the dense one's."),
    ] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, help="Windows of the text, of up to 512 tokens.")] = 4,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace another report.")] = False,
    debug: o.Debug = False,
) -> None:
    """Write one page about runs: sizes, quality, ranks, spectra, losses, costs; of several, what pays.

    It needs no network, opens from disk, and is light or dark as the machine of its reader. Quality is what `lrc eval`
    has measured in each run. Needs pip install 'lowrank_compress[report]'.
    """
    with friendly(debug):
        prepare_libraries()
        from lowrank_compress.pages import page

        with reported() as reporter:
            made = page.report(runs, out, text=text, limit=limit, overwrite=overwrite, reporter=reporter)
        typer.echo(f"Report: {made}")


@app.command()
def sweep(
    config: Annotated[
        Path,
        typer.Argument(
            parser=o.a_path,
            metavar="SWEEP.yaml",
            help="Grid of methods, ratios, seeds, calibrations.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", parser=o.a_path, metavar="PATH", help="Directory for the runs (default: runs/<SWEEP>)"),
    ] = None,
    page: Annotated[
        bool, typer.Option("--report/--no-report", help="Write OUT/report.html, where its libraries are installed.")
    ] = True,
    keep_statistics: Annotated[
        bool, typer.Option("--keep-statistics", help="Keep shared statistics, for ratios that are added later.")
    ] = False,
    overwrite: o.Overwrite = False,
    json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Compress one model in many ways: a grid of methods × ratios × seeds × calibrations, and one table of all.

    Statistics and decompositions are computed once for all runs that can share them; each is an ordinary run in
    OUT/runs, with the bytes that `lrc compress` gives. A run that fails is listed, and the others go on. The same
    command goes on where it was stopped, and makes what was added to the file. Under torchrun each process has its
    share.
    """
    with friendly(debug):
        prepare_libraries()
        from lowrank_compress.cli import sweeping
        from lowrank_compress.cli.terminal import is_first
        from lowrank_compress.stages.sweep import sweep as run_sweep

        place = out or Path("runs") / config.stem
        with reported() as reporter:
            found = run_sweep(config, place, overwrite=overwrite, keep_statistics=keep_statistics, reporter=reporter)
            if is_first() and page:
                found["report"] = sweeping.page_of(found, place, reporter)
        if is_first():
            sweeping.show(found, json)
