"""Run commands in process, and look at what they leave."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from lowrank_compress.artifacts import files
from lowrank_compress.artifacts.files import sha256
from lowrank_compress.artifacts.lock import HOLDER
from lowrank_compress.artifacts.tensors import BlockFiles
from lowrank_compress.cli.main import app

FEW = ("--samples", "8", "--seq-len", "32")
# A program: kills `lrc ARGUMENTS --out DIRECTORY/NUMBER` after each of some seconds, and prints how it ended.
FORKER = """
import os, signal, sys, time
from tests.runs import lrc
for number, moment in enumerate(sys.argv[2].split(",")):
    arguments = [*sys.argv[3:], "--out", os.path.join(sys.argv[1], str(number))]
    pid = os.fork()
    if pid == 0:
        os._exit(lrc(*arguments).code)
    time.sleep(float(moment))
    os.kill(pid, signal.SIGKILL)
    print(os.waitpid(pid, 0)[1])
"""


@dataclass(frozen=True)
class Said:
    """What a command said."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one JSON value that stdout must be."""
        return json.loads(self.out)

    @property
    def text(self) -> str:
        """The message on stderr in one line."""
        return " ".join(self.err.split())


@dataclass(frozen=True)
class Tiny:
    """A checkpoint, a text to calibrate on and another to evaluate on."""

    model: Path
    text: Path
    heldout: Path

    def options(self, run: Path, method: str = "auto", text: Path | str | None = None) -> list[str]:
        """Arguments of `lrc compress`, on a text of its own if there is one."""
        return [*map(str, (self.model, "--method", method, "--calibration", text or self.text, *FEW, "--out", run))]


def lrc(*arguments: object) -> Said:
    """Run a command in process; an error that it does not turn into a message is raised."""
    found = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if found.exception is not None and not isinstance(found.exception, SystemExit):
        raise found.exception
    return Said(found.exit_code, found.stdout, found.stderr)


def done(*arguments: object) -> Said:
    """Run a command that must succeed."""
    said = lrc(*arguments)
    assert said.code == 0, said.err
    return said


def refused(*arguments: object) -> str:
    """Run a command that must fail with exit code 2 and one paragraph on stderr; return that."""
    said = lrc(*arguments)
    assert said.code == 2, said
    assert said.out == ""
    paragraph = said.err[said.err.index("Error:") :]
    assert paragraph.count("\n") == 1, paragraph
    assert "Traceback" not in said.err
    return paragraph


def contents(directory: Path) -> dict[str, str]:
    """Hash every file below a directory, but for what is being built."""
    return {
        str(path.relative_to(directory)): sha256(path)
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != HOLDER and ".lrc-" not in str(path.relative_to(directory))
    }


def results(run: Path) -> dict[str, str]:
    """Hash everything in a run that must repeat byte for byte."""
    return {f"{part}/{name}": digest for part in ("scores", "model") for name, digest in contents(run / part).items()}


def times(directory: Path) -> dict[str, int]:
    """When each file below a directory was written."""
    files = [path for path in directory.rglob("*") if path.is_file()]
    return {str(path.relative_to(directory)): path.stat().st_mtime_ns for path in files}


def block_file(directory: Path, kind: str, block: int) -> Path:
    """Find the file of a block in a stage's directory."""
    (found,) = directory.glob(f"{kind}-*-{block:04d}.safetensors")
    return found


def looks_finished(run: Path) -> list[str]:
    """Name the stages of a run that claim to be complete."""
    return [path.parent.name for path in run.rglob("manifest.json")]


def forked(work: Callable[[], object], *, kill_after: float | None = None) -> int:
    """Do work in a forked process, perhaps killed after so many seconds; return its status, negative for a signal."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            os._exit(1)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def cut_after_a_block(work: Callable[[], object]) -> bool:
    """Do work in a process that ends when it has written the first file of a block; whether it came that far."""

    def cut() -> None:
        write = BlockFiles.write

        def once(self: BlockFiles, *args: Any, **kwargs: Any) -> None:
            write(self, *args, **kwargs)
            os._exit(9)

        BlockFiles.write = once
        work()

    return forked(cut) == 9


def killed_at_rename(number: int, *, after: bool, arguments: list[str]) -> bool:
    """Run a command in a process that dies at its n-th rename; whether it came that far."""

    def work() -> None:
        count = 0

        def dies(rename: Callable[..., None]) -> Callable[..., None]:
            def dying(source: object, target: object) -> None:
                nonlocal count
                count += 1
                if after:
                    rename(source, target)
                if count == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                if not after:
                    rename(source, target)

            return dying

        # Of a file, and of a directory.
        files.os.replace, files.os.rename = dies(os.replace), dies(os.rename)  # pyright: ignore
        lrc(*arguments)

    return forked(work) == -signal.SIGKILL


def printed(place: Path, *commands: Sequence[object]) -> tuple[int, str, str]:
    """Run commands in one forked process; the last one's exit code, and all on stdout and stderr, even past Python."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            for number, name in ((1, "out"), (2, "err")):
                os.dup2(os.open(place / name, os.O_CREAT | os.O_WRONLY), number)
            sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
            for command in commands:
                try:
                    app([str(word) for word in command])
                except SystemExit as ending:
                    code = int(ending.code or 0)
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return code, (place / "out").read_text(), (place / "err").read_text()
