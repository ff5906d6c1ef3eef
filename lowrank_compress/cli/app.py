"""The program `lrc`, to which commands are added, and how much it says."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from typing import Annotated, Any, get_type_hints

import typer

from lowrank_compress import __version__
from lowrank_compress.cli.saying import LOG, listen

Verbose = Annotated[
    int,
    typer.Option(
        "-v",
        "--verbose",
        count=True,
        metavar="",
        show_default=False,
        help="Say what is decided, which files are read and what each step takes; -vv: and all that helps to find a "
        "fault, of the libraries too.",
    ),
]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Print results and errors alone.")]


def _say(verbose: int, quiet: bool) -> None:
    """Set how much is said, if that is asked for."""
    if verbose and quiet:
        raise typer.BadParameter("-v asks for more than usual and -q for less; pass one of them")
    if verbose or quiet:
        LOG.setLevel(logging.ERROR if quiet else logging.INFO if verbose == 1 else logging.DEBUG)


class _Program(typer.Typer):
    """A program all of whose commands take -v and -q, before their names or behind."""

    def command(self, *arguments: Any, **options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Register a command, as typer does."""
        register = super().command(*arguments, **options)

        def add(body: Callable[..., Any]) -> Callable[..., Any]:
            hints = get_type_hints(body, include_extras=True)
            parameters = [
                each.replace(annotation=hints.get(each.name, each.annotation))
                for each in inspect.signature(body).parameters.values()
            ]
            for name, annotation, default in (("verbose", Verbose, 0), ("quiet", Quiet, False)):
                kind = inspect.Parameter.KEYWORD_ONLY
                parameters.append(inspect.Parameter(name, kind, default=default, annotation=annotation))

            def run(*first: Any, verbose: int, quiet: bool, **values: Any) -> Any:
                _say(verbose, quiet)
                return body(*first, **values)

            run.__name__, run.__doc__ = body.__name__, body.__doc__
            run.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportFunctionMemberAccess]
            run.__annotations__ = {each.name: each.annotation for each in parameters}
            register(run)
            return body

        return add


app = _Program(
    name="lrc",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""Compress Hugging Face transformer checkpoints by low-rank factorization.

    The pipeline is calibrate → score → factorize → evaluate. [bold]lrc compress[/] runs the first three; each also
    runs alone on the same run directory. After any interruption the same command continues where it stopped.

    [dim]lrc compress meta-llama/Llama-3.2-1B --ratio 0.3            the recommendation[/]

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
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Take what comes before a command; the help text is that of `app`."""
    listen()
    _say(verbose, quiet)
