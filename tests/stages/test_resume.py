"""After any interruption the same command continues, and ends in the bytes of an undisturbed run."""

import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lowrank_compress.artifacts.lock import locked
from lowrank_compress.model.checkpoint import Checkpoint
from lowrank_compress.stages.identity import checkpoint_id
from tests.runs import (
    FORKER,
    Tiny,
    block_file,
    contents,
    done,
    forked,
    killed_at_rename,
    looks_finished,
    lrc,
    refused,
    results,
    times,
)

Finished = Callable[[str], Path]
# Methods without gradients survive a fork of this process.
METHOD = "svd-llm"


def test_killed_at_random_moments(tiny: Tiny, pristine: Finished, tmp_path: Path):
    chooser = random.Random(1)
    moments = [chooser.uniform(0.02, 0.4) for _ in range(3)]
    root = Path(__file__).parents[2]
    arguments = ["compress", *tiny.options(tmp_path)][:-2]
    command = [sys.executable, "-c", FORKER, str(tmp_path), ",".join(map(str, moments)), *arguments]
    said = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.split()
    assert str(int(signal.SIGKILL)) in said, "no process was killed before it was done"
    for number in range(3):
        done("compress", *tiny.options(tmp_path / str(number)))
        assert results(tmp_path / str(number)) == results(pristine("auto"))


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_killed_at_each_rename_in_turn(tiny: Tiny, pristine: Finished, tmp_path: Path, after: bool):
    """Each file appears by a rename: one run dies at all of them, one after the other."""
    run = tmp_path / "run"
    checkpoint_id(Checkpoint(tiny.model))  # memoised: its file is no part of the run
    number = deaths = 0
    seen: list[dict[str, str]] = [{}]
    while "model" not in looks_finished(run):
        now = contents(run) | {".lock": ""} if run.exists() else {}
        number += now in seen  # some small files are written by every process: let one more pass
        seen.append(now)
        assert killed_at_rename(number, after=after, arguments=["compress", *tiny.options(run, METHOD)])
        deaths += 1
    done("compress", *tiny.options(run, METHOD))
    assert deaths >= 8
    assert results(run) == results(pristine(METHOD))
    assert not list(run.rglob(".*lrc-*"))
    done("verify", run)


@pytest.mark.parametrize(
    ("gone", "rewritten"),
    [
        (["model/manifest.json"], {"model"}),
        (["model"], {"model"}),
        (["model/model.safetensors"], {"model"}),
        (["model", "scores/manifest.json"], {"model", "scores/manifest.json", "scores/ranks.json"}),
        (
            ["model", "scores/manifest.json", "scores/basis-*-0001.safetensors", "stats"],
            {
                "model",
                "scores/manifest.json",
                "scores/ranks.json",
                "scores/basis-*-0001.safetensors",
                "scores/rival-*-0001.safetensors",
            },
        ),
        (
            ["scores/ranks.json"],
            {"scores/manifest.json", "scores/ranks.json"},
        ),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, list) else "",
)
def test_only_what_is_missing_is_made(
    tiny: Tiny, finished: Finished, pristine: Finished, gone: list[str], rewritten: set[str]
):
    run = finished("auto")
    before = times(run)
    for name in gone:
        (path,) = run.glob(name)
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    done("compress", *tiny.options(run))
    assert results(run) == results(pristine("auto"))
    after = times(run)
    changed = {name for name, time in after.items() if before[name] != time and name.startswith(("scores", "model"))}
    found = {"model" if name.startswith("model") else re.sub("-[0-9a-f]{8}-", "-*-", name) for name in changed}
    assert found == rewritten


@pytest.mark.parametrize("damage", ["truncated", "flipped", "of another result"])
def test_damaged_blocks_of_unfinished_stages_are_made_again(
    tiny: Tiny, finished: Finished, pristine: Finished, damage: str
):
    run = finished("auto")
    path = block_file(run / "scores", "basis", 0)
    whole = path.read_bytes()
    other = block_file(run / "scores", "basis", 1).read_bytes()
    flipped = whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:]
    path.write_bytes(
        {"truncated": whole[:-100], "flipped": flipped, "of another result": other[:-8] + b"\0" * 8}[damage]
    )
    (run / "scores" / "manifest.json").unlink()
    done("compress", *tiny.options(run))
    found = results(run)
    assert bool(found.pop(f"scores/{path.name}.bak", None)) == (damage == "truncated")  # nobody knows whose it was
    assert found == results(pristine("auto"))


def test_calibrate_makes_damaged_statistics_again(tiny: Tiny, tmp_path: Path):
    run = tmp_path / "run"
    done("calibrate", *tiny.options(run))
    expected, before = contents(run / "stats"), times(run / "stats")
    block = block_file(run / "stats", "block", 1)
    block.write_bytes(block.read_bytes()[:-1] + b"\x55")
    assert "is not as it was written" in refused("calibrate", *tiny.options(run))
    done("calibrate", *tiny.options(run), "--overwrite")
    assert contents(run / "stats") == expected
    whole = block_file(run / "stats", "block", 0).name
    assert times(run / "stats")[whole] == before[whole]


@pytest.mark.parametrize(
    ("name", "stage"),
    [
        ("scores/basis-*-0000.safetensors", "score"),
        ("scores/manifest.json", "score"),
        ("model/model.safetensors", "refine"),
        ("model/config.json", "refine"),
        ("model/manifest.json", "refine"),
        ("stats/manifest.json", "calibrate"),
    ],
)
@pytest.mark.parametrize("damage", ["changed", "truncated"])
def test_damage_is_found_by_name_and_repaired(
    tiny: Tiny, finished: Finished, pristine: Finished, name: str, stage: str, damage: str
):
    run = finished("auto")
    (path,) = run.glob(name)
    name = str(path.relative_to(run))
    whole = path.read_bytes()
    middle = whole.index(b'"id": "') + 9 if name.endswith("manifest.json") else len(whole) // 2
    changed = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    (run / name).write_bytes(changed if damage == "changed" else whole[:middle])
    said = lrc("verify", run)
    assert said.code == 2
    assert f"the first {name}" in said.text
    assert f"Repeat the {stage} stage with --overwrite" in said.text
    assert lrc("verify", run, "--json").json["ok"] is False
    done("calibrate" if stage == "calibrate" else "compress", *tiny.options(run), "--overwrite")
    assert done("verify", run, "--json").json["ok"] is True
    # What was damaged, or what a damaged manifest can no longer vouch for, is kept.
    assert {name: digest for name, digest in results(run).items() if not name.endswith(".bak")} == results(
        pristine("auto")
    )


def test_a_run_in_use_is_refused(tiny: Tiny, finished: Finished):
    run = finished("svd")
    before = contents(run)
    with locked(run):
        for command in (
            ["compress", *tiny.options(run, "svd")],
            ["calibrate", *tiny.options(run, "svd")],
            ["score", run],
            ["factorize", run],
            ["eval", run, "--perplexity", tiny.heldout],
        ):
            message = refused(*command)
            assert "is in use by another process" in message
            assert f"pid {os.getpid()}" in message
    assert contents(run) | {".lock": ""} == before | {".lock": ""}


@pytest.mark.parametrize("limit", [2_000, 20_000, 40_000, 70_000], ids=lambda size: f"{size} bytes")
def test_a_full_disk_leaves_nothing_that_looks_finished(tiny: Tiny, pristine: Finished, tmp_path: Path, limit: int):
    """A file-size limit stands for the full disk: whatever is larger cannot be written."""
    run, said = tmp_path / "run", tmp_path / "said.txt"

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        found = lrc("compress", *tiny.options(run, METHOD))
        said.write_text(f"{found.code} {found.text}"[:1500])

    assert forked(work) == 0
    code, message = said.read_text().split(" ", 1)
    assert code == "2"
    assert "disk is full" in message
    assert "Traceback" not in message
    assert "model" not in looks_finished(run)
    assert not list(run.rglob(".*lrc-*"))
    done("compress", *tiny.options(run, METHOD))
    assert results(run) == results(pristine(METHOD))
