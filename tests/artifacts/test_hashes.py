"""A hash is remembered only as long as the file is certainly the same."""

import json
import os
import stat
from pathlib import Path

import pytest

from lowrank_compress.artifacts import hashes
from lowrank_compress.artifacts.files import sha256
from lowrank_compress.artifacts.hashes import file_hashes


@pytest.fixture
def memo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own, in which files count as settled at once."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(hashes, "TICK", -1)
    return tmp_path / "cache" / "lowrank_compress" / "hashes.json"


def forge(memo: Path) -> str:
    """Let the memo say something else of every file."""
    wrong = "0" * 64
    memo.write_text(json.dumps(dict.fromkeys(json.loads(memo.read_text()), wrong)))
    return wrong


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file."""
    path = tmp_path / "weights"
    path.write_text("one")
    return path


def test_the_same_file_is_hashed_once(memo: Path, path: Path):
    assert file_hashes({"a": path}) == {"a": sha256(path)}
    wrong = forge(memo)
    assert file_hashes({"a": path}) == {"a": wrong}


@pytest.mark.parametrize("how", ["in place", "another file"])
def test_a_change_that_keeps_size_and_time_is_seen(memo: Path, path: Path, how: str):
    file_hashes({"a": path})
    forge(memo)
    before = path.stat()
    if how == "another file":
        (path.parent / "other").write_text("two")
        os.replace(path.parent / "other", path)
    else:
        path.write_text("two")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file_hashes({"a": path}) == {"a": sha256(path)}


def test_a_file_that_changed_just_now_is_not_remembered(memo: Path, path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hashes, "TICK", 10**12)
    file_hashes({"a": path})
    assert not memo.exists()


@pytest.mark.parametrize("kind", ["writable by all", "link", "pipe", "no JSON"])
def test_a_memo_of_somebody_elses_is_not_believed(memo: Path, path: Path, kind: str):
    file_hashes({"a": path})
    forge(memo)
    if kind == "writable by all":
        memo.chmod(memo.stat().st_mode | stat.S_IWOTH)
    elif kind == "link":
        memo.rename(memo.with_name("elsewhere"))
        memo.symlink_to(memo.with_name("elsewhere"))
    else:
        memo.unlink()
        os.mkfifo(memo) if kind == "pipe" else memo.write_text("{")
    assert file_hashes({"a": path}) == {"a": sha256(path)}


def test_the_memo_is_bounded(memo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hashes, "REMEMBERED", 3)
    for number in range(5):
        (tmp_path / str(number)).write_text(str(number))
        file_hashes({"a": tmp_path / str(number)})
    assert len(json.loads(memo.read_text())) == 3
