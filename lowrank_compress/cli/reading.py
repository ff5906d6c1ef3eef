"""Commands that look at what is there, write it elsewhere, or try it out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lowrank_compress.cli import options as o
from lowrank_compress.cli.app import app
from lowrank_compress.cli.hub import Hub, Token, pushes, use_token
from lowrank_compress.cli.terminal import friendly, prepare_libraries, reported
from lowrank_compress.recipe import RATIO


@app.command()
def show(
    target: o.Target,
    token: Token = None,
    json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Show each matrix: shape, rank, format, kept share, predicted loss and spectrum."""
    with friendly(debug):
        prepare_libraries()
        from lowrank_compress.cli import inspection

        use_token(token)
        inspection.show(target, json)


@app.command("list")
def list_entries(
    what: Annotated[str, typer.Argument(help="methods, allocators, architectures or stages.", show_default=False)],
    json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """List what there is to choose from, plug-ins included."""
    with friendly(debug):
        from lowrank_compress.cli import inspection

        inspection.list_entries(what, json)


@app.command()
def verify(
    target: o.Target,
    write: Annotated[
        Path | None,
        typer.Option(
            "--write",
            parser=o.a_path,
            metavar="EXPECTED.json",
            help="Also write what the run must come out as when it is made again, for `lrc compress --check`.",
            show_default=False,
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Let --write replace a file that is no expectation.")
    ] = False,
    token: Token = None,
    json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Check every file of a run, or of a checkpoint, against its manifests; exit code 2 if one is damaged."""
    with friendly(debug):
        prepare_libraries()
        from lowrank_compress.cli import checking, inspection

        use_token(token)
        place = inspection.verify(target, json)
        if write is not None:
            checking.write(place, write, overwrite)


@app.command()
def refresh(
    target: Annotated[
        Path,
        typer.Argument(
            parser=o.a_path, metavar="TARGET", help="A run directory or a compressed checkpoint.", show_default=False
        ),
    ],
    json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Replace a checkpoint's own model code, which loads it where this package is not installed, by this version's."""
    with friendly(debug):
        prepare_libraries()
        from lowrank_compress.cli import commands, printing

        printing.print_refreshed(commands.refresh(target), json)


@app.command()
@pushes
def export(
    hub: Hub,
    target: o.Target,
    dense: Annotated[
        Path | None,
        typer.Option(
            "--dense",
            parser=o.a_path,
            metavar="PATH",
            help="New directory for a dense checkpoint, as large as the original.",
            show_default=False,
        ),
    ] = None,
    native: Annotated[
        Path | None,
        typer.Option(
            "--native",
            parser=o.a_path,
            metavar="PATH",
            help="New directory for a stock checkpoint of the smaller size; where all blocks have one shape (compress "
            "with --method nystrom --attention dense --allocate equal-widths).",
            show_default=False,
        ),
    ] = None,
    overwrite: o.Overwrite = False,
    debug: o.Debug = False,
) -> None:
    """Write the compressed weights as an ordinary checkpoint that needs nothing of this package."""
    with friendly(debug):
        prepare_libraries()
        from lowrank_compress.cli import exporting

        with reported() as reporter:
            hub.check()
            written = exporting.export(target, dense, native, overwrite, reporter)
            hub.push(written, {}, False, overwrite, reporter)


@app.command()
def bench(
    targets: Annotated[
        list[str], typer.Argument(help="Run directories or checkpoints; all are measured in turn.", show_default=False)
    ],
    against: Annotated[
        str | None,
        typer.Option("--against", help="Checkpoint or run to compare with (default: what the run was made from)"),
    ] = None,
    batch_size: Annotated[str, typer.Option("--batch-size", help="Sequences at once, separated by commas.")] = "1,8",
    prompt_tokens: Annotated[
        str, typer.Option("--prompt-tokens", help="Lengths of the random prompts, separated by commas.")
    ] = "128,512",
    new_tokens: Annotated[
        int | None,
        typer.Option("--new-tokens", min=1, max=10**6, help="Tokens generated after each prompt (default: 32)"),
    ] = None,
    rounds: Annotated[
        int, typer.Option("--rounds", min=1, max=10**6, help="Measurements of each, after a warm-up.")
    ] = 5,
    seed: Annotated[int, typer.Option("--seed", min=0, max=2**63 - 1, help="Seed of the random prompts.")] = 0,
    device: Annotated[str | None, o.of_recipe("device")] = None,
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", help="float32, bfloat16, float16 or float64 (default: each checkpoint's)"),
    ] = None,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Compile the forward passes; on a GPU with CUDA graphs.")
    ] = False,
    attention: Annotated[
        str | None, typer.Option("--attention", help="sdpa or eager (default: sdpa, if all models have it)")
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option("--threads", min=1, max=1024, help="CPU threads (default: OMP_NUM_THREADS, or one a core)"),
    ] = None,
    json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Measure how fast a compressed checkpoint is: ratios to its original, both measured in turn."""
    with friendly(debug):
        prepare_libraries()
        from lowrank_compress.cli import benchmark

        with reported() as reporter:
            found = benchmark.measure(
                targets,
                against,
                batch_size=batch_size,
                prompt_tokens=prompt_tokens,
                new_tokens=new_tokens,
                rounds=rounds,
                seed=seed,
                device=device,
                dtype=dtype,
                compiled=compiled,
                attention=attention,
                threads=threads,
                reporter=reporter,
            )
        benchmark.show(found, json)


@app.command()
def demo(
    ratio: Annotated[float, typer.Option("--ratio", help="Share of parameters to remove.")] = RATIO,
    out: Annotated[Path, typer.Option("--out", parser=o.a_path, metavar="PATH", help="Directory for the runs.")] = Path(
        "runs/demo"
    ),
    json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Compress the small model that comes with the package by svd, fwsvd and auto; measure on held-out text."""
    with friendly(debug):
        prepare_libraries()
        from lowrank_compress.cli import commands, printing

        with reported() as reporter:
            rows = commands.demo(ratio, out, reporter)
        printing.print_demo(rows, json)
