"""Every command that README and the pages of docs/ show does what it says, on tiny models, in one process."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest

from tests.commands import SKIPPED, Command, commands, furnish
from tests.runs import FEW, lrc

COMMANDS = commands()
RUN = {page: [each for each in found if each.skipped is None] for page, found in COMMANDS.items()}


@pytest.fixture(scope="module")
def furnished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("reader")
    furnish(place)
    return place


def marked(page: str) -> object:
    """README's commands take as long as those of all other pages, which may be left out."""
    return page if page == "README.md" else pytest.param(page, marks=pytest.mark.docs)


@pytest.mark.slow
@pytest.mark.parametrize("page", [marked(page) for page, found in RUN.items() if found])
def test_commands_of_a_page_run(page: str, furnished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a block one after the other; those of sentences each by itself."""
    place = tmp_path / "here"
    shutil.copytree(furnished, place)
    monkeypatch.chdir(place)
    failed = []
    for number, command in enumerate(RUN[page]):
        words = command.runnable(number)
        if not command.in_block:
            shutil.rmtree("runs")
            shutil.copytree(furnished / "runs", "runs")
        if "--out" in words:  # where it is to begin from nothing
            shutil.rmtree(words[words.index("--out") + 1], ignore_errors=True)
        start, said = time.perf_counter(), lrc(*words)
        print(f"{time.perf_counter() - start:6.1f} s  lrc {' '.join(words)}", flush=True)
        if said.code != 0:
            failed.append(f"{command.line}\n  ran as lrc {' '.join(words)}\n  {said.code}: {said.text[-600:]}")
    assert not failed, "\n".join(failed)


def test_what_is_skipped_is_there() -> None:
    every = [word for found in COMMANDS.values() for command in found for word in command.words]
    assert set(SKIPPED) <= set(every)


def test_most_commands_run() -> None:
    names = {command.words[1] for found in RUN.values() for command in found}
    assert names >= {"compress", "calibrate", "score", "factorize", "refine", "recover", "cast", "quantize", "eval"}
    assert names >= {"compare", "sweep", "report", "diagnose", "bench", "show", "list", "verify", "export", "card"}


def test_words_that_stand_for_others_are_replaced() -> None:
    line = "lrc recover CHECKPOINT --text mine.txt --out DIRECTORY  # a comment"
    made = ["recover", "runs/mine/model", "--text", "mine.txt", "--out", "made-3", "--steps", "4", "--seq-len", "32"]
    assert Command("", line).runnable(3) == made
    eight = Command("", "lrc compress ./my-model --memory-budget 8GB …")
    assert eight.runnable(0) == ["compress", *eight.words[2:], "--calibration", "my-text.txt", *FEW]
    native = Command("", "lrc export RUN --native OUT")
    assert native.runnable(1) == ["export", "runs/narrow", "--native", "made-1"]
    assert Command("", "lrc recover").spoken_of
    assert Command("", "lrc compress MODEL --push-to-hub NAME").skipped
