"""One case: make its place, run its commands, and judge what became of them."""

from __future__ import annotations

import os
import re
import signal
import tempfile
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import torch
from transformers import dynamic_module_utils

from mutations.place import Mutation, Place, Step, inventory, lrc

SECONDS = 20
SLOT = ("work", "home", "outside", "cache", "modules")
# What may happen, and what must not.
GOOD = ("same", "refused", "stricter")
BAD = ("different", "traceback", "crash", "hang", "lost", "litter", "message", "exit code", "died", "unfair")
LEFTOVER = re.compile(r"\.lrc-.*\.(tmp|new|old)|\.partial$|^draft-")
# What a library said may be quoted.
QUOTED = re.compile(r"\(.*\)|(?<=transformers cannot read).*", re.DOTALL)
POOR = re.compile(
    r"has no attribute|is not (iterable|subscriptable|callable)|unexpected keyword|list index|KeyError|\bNoneType\b"
)


class Hang(BaseException):
    """A command took too long."""


@dataclass
class Result:
    """What became of a case: the worst of its commands."""

    case: str
    mutation: str
    outcome: str = "same"
    note: str = ""
    commands: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def worsen(self, outcome: str, note: str) -> None:
        """Keep the worst."""
        order = (*GOOD, *reversed(BAD))
        if order.index(outcome) > order.index(self.outcome):
            self.outcome, self.note = outcome, note


def attempt(case: str, name: str, mutation: Mutation, seed: int, home: Path) -> Result:
    """Try one case in this process, in its slot."""
    result = Result(case, name)
    template = home / "template"
    for part in SLOT:
        (home / part).mkdir(parents=True)
    (home / "outside/notes.txt").write_text("nobody's business")
    (home / "home/notes.txt").write_text("at home")
    os.environ |= {"HOME": str(home / "home"), "XDG_CACHE_HOME": str(home / "cache")}
    dynamic_module_utils.HF_MODULES_CACHE = str(home / "modules")
    tempfile.tempdir = str(home / "cache")
    os.chdir(home / "work")
    torch.manual_seed(0)
    place = Place(home / "work", template, home / "outside", Random(f"{seed}/{case}"))
    started = time.monotonic()
    try:
        steps = mutation(place)
    except Exception:
        result.worsen("unfair", f"the mutation itself fails: {traceback.format_exc()[-600:]}")
        return result
    for step in steps:
        result.commands.append(" ".join(map(repr, step.words)))
        before = inventory(home / "work", home / "home", home / "outside", template)
        went_well = take_step(step, result)
        compare(place, before, inventory(home / "work", home / "home", home / "outside", template), result)
        if not went_well:
            break
    result.seconds = time.monotonic() - started
    return result


def take_step(step: Step, result: Result) -> bool:
    """Run a command and judge it; say whether it succeeded."""

    def alarm(*_: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, 2)  # once more, if this one is swallowed
        raise Hang

    # Twenty seconds of a machine that does nothing else.
    crowd = max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
    signal.signal(signal.SIGALRM, alarm)
    signal.setitimer(signal.ITIMER_REAL, SECONDS * crowd)
    try:
        said = lrc(*step.words)
    except Hang:
        result.worsen("hang", f"more than {SECONDS} s")
        return False
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    result.said.append(f"{said.code}\n{said.out[-2000:]}{said.err[-3000:]}")
    if isinstance(said.problem, Hang):
        result.worsen("hang", f"more than {SECONDS} s: {where(said.problem)}")
    elif said.problem is not None:
        result.worsen("traceback", f"{type(said.problem).__name__}: {first_line(said.problem)} {where(said.problem)}")
    elif said.code == 0:
        complaint = None
        if step.check is not None:
            try:
                complaint = step.check(said)
            except Exception as problem:
                complaint = f"cannot be compared: {type(problem).__name__}: {first_line(problem)} {where(problem)}"
        if complaint:
            result.worsen("different", complaint)
        return True
    elif said.code == 1:
        result.worsen("crash", said.err.strip()[-400:])
    elif said.code == 3 and "--tolerance" in step.words:
        result.worsen("same", "")
    elif said.code != 2:
        result.worsen("exit code", f"{said.code}: {said.err[-300:]}")
    elif wrong := unclear("" if step.words[0] == "verify" or "--check" in step.words else said.out, said.err):
        result.worsen("message", wrong)
    elif step.must:
        result.worsen("different", f"refused what must work: {said.err.strip()[-300:]}")
    else:
        result.worsen("refused", said.err.strip()[-300:])
        if step.stock is not None and not waits():
            signal.setitimer(signal.ITIMER_REAL, SECONDS)  # transformers may try to build a billion layers
            with suppress(Exception, Hang):
                step.stock()
                result.worsen("stricter", said.err.strip()[-300:])
            signal.setitimer(signal.ITIMER_REAL, 0)
    return False


def waits() -> bool:
    """Whether there is a pipe, at which transformers would wait for ever."""
    return any(state.startswith("special") for state in inventory(Path.cwd()).values())


def unclear(out: str, err: str) -> str | None:
    """Complain about a refusal that is not one clear paragraph on stderr."""
    if err.startswith("Usage:") or "─ Error ─" in err:  # of the library that parses the words
        return None
    if out:
        return f"refused, but printed {out[:100]!r}"
    if err.count("Error:") < 1 or "Traceback" in err:
        return f"no paragraph: {err[-300:]!r}"
    paragraph = err[err.index("Error:") :]
    if paragraph.count("\n") != 1:
        return f"not one paragraph: {paragraph[:400]!r}"
    if len(paragraph) > 3000:
        return f"{len(paragraph)} characters: {paragraph[:200]!r}"
    if found := POOR.search(QUOTED.sub("", paragraph)):
        return f"Python's own words ({found.group()}): {paragraph[:300]}"
    return None


def first_line(problem: BaseException) -> str:
    """The beginning of an error."""
    return (str(problem).strip().splitlines() or [""])[0][:200]


def where(problem: BaseException) -> str:
    """The innermost line of the package in a traceback."""
    frames = [
        frame
        for frame in traceback.extract_tb(problem.__traceback__)
        if "lowrank_compress/" in frame.filename or "mutations/" in frame.filename
    ]
    return f"[{frames[-1].filename.rpartition('lowrank_compress/')[2]}:{frames[-1].lineno}]" if frames else ""


def compare(place: Place, before: dict[str, str], after: dict[str, str], result: Result) -> None:
    """Look for what was lost or left behind."""
    work = str(place.path)
    kept = {(path.rpartition("/")[0], state) for path, state in after.items()}
    for path, state in before.items():
        relative = os.path.relpath(path, work)
        if after.get(path) == state or (relative in place.loose or path in place.loose):
            continue
        folder = path.rpartition("/")[0]
        if not any(there == state and (where_ == folder or where_.startswith(f"{folder}")) for where_, there in kept):
            result.worsen("lost", f"{relative} ({state[:20]}) is {after.get(path, 'gone')[:20]}")
    for path in after.keys() - before.keys():
        name = os.path.basename(path)
        if LEFTOVER.search(name):
            result.worsen("litter", f"left {os.path.relpath(path, work)}")
        if not path.startswith(work):
            result.worsen("lost", f"wrote {path}")
