"""What people see: one progress bar a step, tables, and errors without tracebacks."""

from __future__ import annotations

import io
import json
import logging
import os
import sys
import tempfile
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import typer
from rich import filesize
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from lowrank_compress.cli.saying import LOG, is_first, is_quiet, messages, one_line, printable, without_token
from lowrank_compress.errors import LrcError

BLOCKS = "▁▂▃▄▅▆▇█"


class TerminalReporter:
    """Shows a stage's progress as bars with the time left; where stderr is no terminal, one line a finished step."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description:<22}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=messages,
            disable=not (messages.is_terminal and is_first()) or is_quiet(),
        )
        self._tasks: dict[str, TaskID] = {}
        self._warned: set[str] = set()

    def advance(self, step: str, done: int, total: int) -> None:
        """Move a step's bar, adding it when it first appears."""
        if step not in self._tasks:
            self._tasks[step] = self._progress.add_task(step, total=total)
        self._progress.update(self._tasks[step], completed=done, total=total)
        if done == total and is_first() and not messages.is_terminal and not is_quiet():
            messages.print(f"{step}: done ({total})")

    def warn(self, text: str) -> None:
        """Print a warning once."""
        if is_first() and text not in self._warned and not is_quiet():
            self._warned.add(text)
            messages.print(f"[yellow]Warning:[/] {_escape(text)}", soft_wrap=True)

    def __enter__(self) -> TerminalReporter:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()


@contextmanager
def reported() -> Iterator[TerminalReporter]:
    """Show progress while inside."""
    with TerminalReporter() as reporter:
        yield reporter


@contextmanager
def friendly(debug: bool) -> Iterator[None]:
    """Turn errors that input can cause into one paragraph and exit code 2, all others into one line and exit code 1.

    The traceback of the others goes to a file, for whoever mends them.

    Parameters
    ----------
    debug
        Show the traceback of every error instead.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A path need not be UTF-8; stderr shows such letters escaped by itself.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        yield
    except (typer.Exit, typer.Abort):
        raise
    except KeyboardInterrupt:
        messages.print("Interrupted. The same command continues from the finished blocks.")
        raise typer.Exit(130) from None
    except BrokenPipeError:
        # Whoever read our output has seen enough; nothing may be written when Python ends either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(141) from None
    except Exception as problem:
        if debug:
            raise
        text = _explained(problem)
        if text is not None:
            messages.print(f"[bold red]Error:[/] {_escape(one_line(text))}", soft_wrap=True)
            raise typer.Exit(2) from None
        messages.print(f"[bold red]Unexpected:[/] {_escape(_unexpected(problem))}", soft_wrap=True)
        raise typer.Exit(1) from None


def _explained(problem: Exception) -> str | None:
    """Say what an error means to the user; None if it is not his to mend."""
    from lowrank_compress.artifacts.files import is_disk_full

    if isinstance(problem, LrcError):
        return str(problem)
    if is_disk_full(problem):  # safetensors reports it by an exception of its own
        return f"The disk is full: {problem}. Nothing half-written counts as finished. Free some space and repeat."
    if _lacks_memory(problem):
        return (
            "There is not enough memory for this. Take fewer or shorter windows (--samples, --seq-len) or a smaller "
            "--batch-size or --memory-budget, where the command has them, or a machine with more."
        )
    if isinstance(problem, OSError):
        where = f"{problem.filename}: " if problem.filename else ""
        return (
            f"{where}{problem.strerror or problem}. Check that the place is there, that you may read it (and write to "
            "it, if it is for results), and that its name is not too long; or choose another."
        )
    return None


def _lacks_memory(problem: Exception) -> bool:
    words = ("can't allocate memory", "out of memory", "unable to mmap")
    return isinstance(problem, MemoryError) or (
        isinstance(problem, RuntimeError) and any(word in str(problem).lower() for word in words)
    )


def _unexpected(problem: Exception) -> str:
    """Keep the traceback in a file, and say where."""
    what = f"{type(problem).__name__}: {one_line(str(problem))[:200]}"
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="lrc-", suffix=".txt", delete=False, encoding="utf-8", errors="backslashreplace"
        ) as file:
            told = f"{sys.version}\n{sys.argv}\n\n{''.join(traceback.format_exception(problem))}"
            file.write(without_token(told))
    except OSError:
        return f"{what}. This is a fault of lrc. Repeat with --debug for the traceback, and report it with that."
    return f"{what}. This is a fault of lrc; please report it with {file.name}, which holds the traceback."


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def prepare_libraries() -> None:
    """Keep the libraries' own bars and hints off the screen, and pin their threads.

    Sums depend on the number of threads in the last bits: it is one for the whole process (that of the environment,
    or one thread a core), and the manifests record it.
    """
    cores = str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    threads = os.environ.setdefault("OMP_NUM_THREADS", cores)
    os.environ.setdefault("MKL_NUM_THREADS", threads)
    os.environ.setdefault("OPENBLAS_NUM_THREADS", threads)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if not messages.is_terminal:
        os.environ.setdefault("TQDM_DISABLE", "1")
    import transformers

    from lowrank_compress.resources.memory import give_back_freed

    noise = {logging.INFO: logging.WARNING, logging.DEBUG: logging.INFO}.get(LOG.level, logging.ERROR)
    for name in ("transformers", "huggingface_hub", "datasets", "peft"):
        logging.getLogger(name).setLevel(noise)
    transformers.logging.set_verbosity(noise)
    transformers.logging.disable_progress_bar()
    give_back_freed()


def print_json(value: object) -> None:
    """Print one JSON object on stdout."""
    sys.stdout.write(json.dumps(_finite(value), indent=2, ensure_ascii=False) + "\n")


def _finite(value: Any) -> Any:
    """Replace what JSON cannot say (infinity) by null."""
    if isinstance(value, Mapping):
        return {str(name): _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value


def console() -> Console:
    """Console of results; wide where stdout is no terminal, so that nothing is cut off in a file or pipe."""
    plain = Console(highlight=False, markup=False, emoji=False)
    return plain if plain.is_terminal else Console(highlight=False, markup=False, emoji=False, width=200)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> Table:
    """Make a table: the first `left` columns are text, the others numbers."""
    made = Table(title=printable(title) or None, title_justify="left", header_style="bold")
    for number, name in enumerate(columns):
        made.add_column(name, justify="left" if number < left else "right", overflow="fold")
    for row in rows:
        made.add_row(*map(printable, row))
    return made


def sparkline(values: Sequence[float], width: int = 24) -> str:
    """Draw positive values on a logarithmic scale of six decades, in `width` characters."""
    import math

    if not values or max(values) <= 0:
        return ""
    top = max(values)
    step = max(1, len(values) // width)
    shown = list(values)[::step][:width]
    heights = [max(0.0, 1 + math.log10(max(value, top * 1e-6) / top) / 6) for value in shown]
    return "".join(BLOCKS[min(len(BLOCKS) - 1, int(height * (len(BLOCKS) - 1) + 0.5))] for height in heights)


def number(value: float | None) -> str:
    """Format a measure with four significant digits."""
    if value is None:
        return "–"
    return f"{value:.4g}" if abs(value) < 1e5 else f"{value:.3g}"


def duration(seconds: float) -> str:
    """Say how long something took: in seconds, from two minutes in minutes, from two hours in hours."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def share_of(ratio_of: str, count: int | None = None) -> str:
    """Say in words what a ratio is a share of."""
    parameters = "the parameters" if count is None else f"the {count:,} parameters"
    return f"{parameters} {'inside the blocks' if ratio_of == 'blocks' else 'of the model'}"


def became(before: int, after: int) -> str:
    """Say what bytes became."""
    change = f"{after / before - 1:+.2%}".replace("-", "−")
    return f"{filesize.decimal(before)} became {filesize.decimal(after)} ({change})"
