"""One process at a time in a run."""

import os
import time
from pathlib import Path

import pytest

from lowrank_compress.artifacts.lock import HOLDER, locked
from lowrank_compress.errors import LockedError
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
