"""What is said beside results: to stderr, as much of it as is wanted, and in one paragraph each."""

from __future__ import annotations

import logging
import os
import re

from rich.console import Console

# Errors, warnings and progress go to stderr: stdout is for results, and for nothing but the object under --json.
messages = Console(stderr=True, highlight=False, emoji=False)
LOG = logging.getLogger("lowrank_compress")


class _Said(logging.Handler):
    """Prints what the package logs, one line each, without disturbing the bars."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record, in the first of several processes."""
        if is_first():
            messages.print(one_line(record.getMessage()), style="dim", markup=False, soft_wrap=True)


def listen() -> None:
    """Print what the package logs from here on: warnings, until somebody asks for more or less."""
    LOG.handlers, LOG.propagate = [_Said()], False
    LOG.setLevel(logging.WARNING)


def is_quiet() -> bool:
    """Whether results and errors are all that is to be said."""
    return not LOG.isEnabledFor(logging.WARNING)


def hint(text: str) -> None:
    """Print something that is no result, unless results are all that is wanted."""
    if not is_quiet():
        messages.print(text, style="dim", markup=False, soft_wrap=True)


def is_first() -> bool:
    """Whether this process speaks: of several that torchrun started the first; the others only of errors."""
    return os.environ.get("RANK", "0") == "0"


def one_line(text: str) -> str:
    """Show a text in one paragraph, with what cannot be printed spelled out and very long words cut in the middle."""
    return re.sub(r"(\S{100})\S{200,}(\S{100})", r"\1…\2", printable(without_token(text).replace("\n", " ")))


def without_token(text: str) -> str:
    """Leave the hub's token out of a text, whoever has written it there."""
    token = os.environ.get("HF_TOKEN", "").strip()
    return text.replace(token, "…") if token else text


def printable(text: str) -> str:
    """Spell out what a terminal cannot show, or would obey."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
