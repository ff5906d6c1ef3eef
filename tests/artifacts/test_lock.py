"""One process at a time in a run."""

import os
import time
from pathlib import Path

import pytest

from lowrank_compress.artifacts.lock import HOLDER, LOCK, locked
from lowrank_compress.errors import ArtifactError, LockedError
from tests.runs import forked


def test_a_second_holder_is_refused_by_the_name_of_the_first(tmp_path: Path):
    with (
        locked(tmp_path / "run"),
        pytest.raises(LockedError, match=rf"in use by another process \(pid {os.getpid()}\)"),
        locked(tmp_path / "run"),
    ):
        pass
    with locked(tmp_path / "run"):
        pass


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path):
    def hold() -> None:
        with locked(tmp_path):
            time.sleep(60)

    assert forked(hold, kill_after=0.2) == -9
    assert (tmp_path / HOLDER).read_text() != f"pid {os.getpid()}\n"
    with locked(tmp_path):
        assert (tmp_path / HOLDER).read_text() == f"pid {os.getpid()}\n"


@pytest.mark.parametrize("name", [LOCK, HOLDER])
@pytest.mark.parametrize("kind", ["notes", "hard link", "link", "pipe"])
def test_what_is_no_lock_is_left_as_it_is(tmp_path: Path, name: str, kind: str):
    run, precious = tmp_path / "run", tmp_path / "precious"
    run.mkdir()
    precious.write_text("mine" if kind != "hard link" else "")
    path = run / name
    {
        "notes": lambda: path.write_text("mine"),
        "hard link": lambda: path.hardlink_to(precious),
        "link": lambda: path.symlink_to(precious),
        "pipe": lambda: os.mkfifo(path),
    }[kind]()
    with pytest.raises(ArtifactError, match="is not the lock of a run, and is left as it is"), locked(run):
        pass
    assert precious.read_text() == ("mine" if kind != "hard link" else "")
    assert kind != "notes" or path.read_text() == "mine"


def test_the_lock_of_an_older_version_is_one(tmp_path: Path):
    (tmp_path / LOCK).write_text("pid 17\n")
    with locked(tmp_path):
        pass
