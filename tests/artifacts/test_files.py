"""Files appear whole or not at all."""

import errno
import hashlib
import os
from pathlib import Path

import pytest

from lowrank_compress.artifacts import files
from lowrank_compress.errors import ArtifactError


def fail(problem: BaseException):
    def write(path: Path) -> None:
        path.write_text("half")
        raise problem

    return write


@pytest.mark.parametrize("there", ["old", None])
def test_a_failed_write_changes_nothing(tmp_path: Path, there: str | None):
    path = tmp_path / "file"
    if there:
        path.write_text(there)
    with pytest.raises(KeyboardInterrupt):
        files.write_atomically(path, fail(KeyboardInterrupt()))
    assert [(found.name, found.read_text()) for found in tmp_path.iterdir()] == ([("file", "old")] if there else [])


@pytest.mark.parametrize(
    "problem",
    [
        OSError(errno.ENOSPC, "full"),
        OSError(errno.EDQUOT, "quota"),
        OSError(errno.EFBIG, "big"),
        RuntimeError("I/O error: No space left (os error 28)"),
    ],
)
def test_a_full_disk_is_said_so(tmp_path: Path, problem: Exception):
    with pytest.raises(ArtifactError, match=r"disk is full: .*file could not be written.*finished blocks are kept"):
        files.write_atomically(tmp_path / "file", fail(problem))
    assert list(tmp_path.iterdir()) == []


def test_other_errors_keep_their_type(tmp_path: Path):
    with pytest.raises(PermissionError):
        files.write_atomically(tmp_path / "file", fail(PermissionError("no")))


def test_hash_is_of_the_bytes(tmp_path: Path):
    data = bytes(range(256)) * 9000  # more than one chunk
    (tmp_path / "a").write_bytes(data)
    assert files.sha256(tmp_path / "a") == hashlib.sha256(data).hexdigest()


def test_a_link_is_replaced_and_not_followed(tmp_path: Path):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "a.json").symlink_to(tmp_path / "precious")
    files.write_text(tmp_path / "a.json", "{}")
    assert (tmp_path / "precious").read_text() == "mine"
    assert not (tmp_path / "a.json").is_symlink()


def test_what_has_the_name_of_a_draft_stays(tmp_path: Path):
    (tmp_path / "a.json.partial").write_text("mine")
    files.write_text(tmp_path / "a.json", "{}")
    assert (tmp_path / "a.json.partial").read_text() == "mine"


def test_only_our_temporary_files_are_swept(tmp_path: Path):
    for name in (".lrc-abcdefgh.tmp", ".lrc-notes.tmp", "lrc-abcdefgh.tmp", "a.tmp"):
        (tmp_path / name).write_text("")
    (tmp_path / ".lrc-12345678.tmp").mkdir()
    files.sweep(tmp_path)
    kept = {".lrc-notes.tmp", "lrc-abcdefgh.tmp", "a.tmp", ".lrc-12345678.tmp"}
    assert {path.name for path in tmp_path.iterdir()} == kept


def test_pipes_and_devices_are_not_opened(tmp_path: Path):
    os.mkfifo(tmp_path / "a.json")
    for path in (tmp_path / "a.json", Path("/dev/zero"), tmp_path):
        with pytest.raises(ArtifactError, match="no regular file"):
            files.read_bytes(path)
    with pytest.raises(ArtifactError, match="no regular file"):
        files.sha256(tmp_path / "a.json")


@pytest.mark.skipif(not Path("/proc/self/mem").is_file(), reason="needs a file that opens and cannot be read")
def test_a_file_that_fails_while_it_is_read_is_an_error_of_ours():
    for read in (files.read_bytes, files.sha256):
        with pytest.raises(ArtifactError, match=r"/proc/self/mem cannot be read \(.*Input/output error"):
            read(Path("/proc/self/mem"))


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path):
    (tmp_path / "a.json").write_bytes(b" " * 11)
    with pytest.raises(ArtifactError, match="has 11 bytes; no such file has more than 10"):
        files.read_bytes(tmp_path / "a.json", 10)
