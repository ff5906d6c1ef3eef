"""Where a case happens: a directory of its own with copies of what it asks for, made once from nothing."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from typer.testing import CliRunner

from lowrank_compress.cli.main import app

SEQ_LEN = 16
FEW = ("--samples", "4", "--seq-len", str(SEQ_LEN), "--device", "cpu")
TEXT, HELDOUT, TABLE = "calibration.txt", "heldout.txt", "examples.csv"


@dataclass(frozen=True)
class Made:
    """How a run is made: by which method and other options of `lrc compress`, and of which checkpoint."""

    method: str
    more: tuple[str, ...] = ()
    model: str = "model"


RUNS: dict[str, Made] = {
    "run-svd": Made("svd"),
    "run-svd-llm": Made("svd-llm"),
    "run-auto": Made("auto"),
    "run-modegpt": Made("modegpt"),
    "run-experts": Made("svd-llm", ("--experts", "auto"), "mixture"),
    "run-pruned": Made("svd-llm", ("--experts", "reap"), "mixture"),
    "run-merged": Made("svd-llm", ("--experts", "merge"), "mixture"),
}
NOT_DENSE = ("run-pruned",)
"""Runs that have no dense export."""


@dataclass(frozen=True)
class Said:
    """What a command said: exit code, stdout, stderr, and the exception that it let through."""

    code: int
    out: str
    err: str
    problem: BaseException | None


def lrc(*words: object) -> Said:
    """Run a command in this process."""
    found = CliRunner().invoke(app, [str(word) for word in words])
    problem = found.exception if not isinstance(found.exception, SystemExit) else None
    return Said(found.exit_code, found.stdout, found.stderr, problem)


Check = Callable[[Said], str | None]
"""Given what a command that succeeded said, a complaint, or None."""


@dataclass(frozen=True)
class Step:
    """A command to run.

    Attributes
    ----------
    words
        The command line.
    check
        Compares what a success gave with the truth.
    stock
        Does by transformers what the command does; it succeeds where the command is stricter than need be.
    must
        It has to succeed: the mutation is one that users make.
    """

    words: tuple[str, ...]
    check: Check | None = None
    stock: Callable[[], object] | None = None
    must: bool = False


Mutation = Callable[["Place"], list[Step]]


@dataclass
class Place:
    """A case's directory, which is the working directory, and its random numbers.

    Attributes
    ----------
    template
        Pristine checkpoints, texts and runs, by name; not to be written to.
    outside
        Files that are nobody's business.
    """

    path: Path
    template: Path
    outside: Path
    rng: Random
    loose: set[str] = field(default_factory=set)

    def take(self, name: str, to: str | None = None) -> Path:
        """Copy something pristine, with what it needs, here; return its path relative to here."""
        source, target = self.template / name, Path(to or name)
        if name.startswith("run-"):
            for needed in (RUNS[name.partition("/")[0].partition(".")[0]].model, TEXT):
                if not os.path.lexists(needed):
                    self.take(needed)
        if source.is_dir():
            shutil.copytree(source, target)
        else:
            shutil.copyfile(source, target)
        return target

    def compress(self, model: str, method: str, run: str = "run", *more: str) -> tuple[str, ...]:
        """Words of `lrc compress`."""
        return ("compress", model, "--method", method, "--calibration", TEXT, *FEW, "--out", run, *more)

    def again(self, name: str, run: str = "run", *more: str) -> tuple[str, ...]:
        """Words of the command that made a run."""
        made = RUNS[name]
        return self.compress(made.model, made.method, run, *made.more, *more)

    def eval(self, target: str, text: str = HELDOUT, *more: str) -> tuple[str, ...]:
        """Words of `lrc eval`."""
        return ("eval", target, "--perplexity", text, "--seq-len", str(SEQ_LEN), "--device", "cpu", "--json", *more)


def inventory(*directories: Path) -> dict[str, str]:
    """What lies below directories: path -> kind and content, without opening what is no regular file."""
    found: dict[str, str] = {}
    for directory in directories:
        for parent, folders, files in os.walk(directory):
            for name in (*folders, *files):
                path = os.path.join(parent, name)
                found[path] = _state(path)
    return found


def _state(path: str) -> str:
    mode = os.lstat(path).st_mode
    if stat.S_ISLNK(mode):
        return f"link {os.readlink(path)}"
    if stat.S_ISDIR(mode):
        return "directory"
    if not stat.S_ISREG(mode):
        return f"special {stat.S_IFMT(mode)}"
    size = os.stat(path).st_size
    if size > 50_000_000:
        return f"file {size}"
    with open(path, "rb") as file:
        return f"file {hashlib.sha256(file.read()).hexdigest()}"


def json_of(said: Said) -> Any:
    """The JSON that a command printed."""
    return json.loads(said.out)
