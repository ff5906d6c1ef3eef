"""The program `lrc`, to which commands are added."""

from __future__ import annotations

from typing import Annotated

import typer

from lowrank_compress import __version__

app = typer.Typer(
    name="lrc",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""Compress Hugging Face transformer checkpoints by low-rank factorization.

    The pipeline is calibrate → score → factorize → evaluate. [bold]lrc compress[/] runs the first three; each also
    runs alone on the same run directory. After any interruption the same command continues where it stopped.

    [dim]lrc compress meta-llama/Llama-3.2-1B --ratio 0.3            the recommendation, calibrated on WikiText-2[/]

    [dim]lrc compress ./model --method fwsvd --calibration my.txt    a paper's method, on your own text[/]

    [dim]lrc eval runs/Llama-3.2-1B-auto-0.3 --perplexity my-test.txt[/]
    """,
)


def _tell_version(asked: bool) -> None:
    if asked:
        typer.echo(f"lrc {__version__}")
        raise typer.Exit


@app.callback()
def program(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_tell_version, is_eager=True)
    ] = False,
) -> None:
    """Take what comes before a command; the help text is that of `app`."""
