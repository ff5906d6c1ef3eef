"""Files appear whole or not at all."""

import errno
import hashlib
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


def test_json_keeps_order_and_letters(tmp_path: Path):
    files.write_json(tmp_path / "a.json", {"b": 1, "a": "é"})
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == '{\n  "b": 1,\n  "a": "é"\n}\n'
    assert files.read_json(tmp_path / "a.json") == {"b": 1, "a": "é"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        (b"{", "cannot be read as JSON"),
        (b"\xff", "cannot be read"),
        (b"[]", "JSON list; expected an object"),
    ],
)
def test_what_is_no_json_object_is_refused(tmp_path: Path, content: bytes | None, message: str):
    if content is not None:
        (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ArtifactError, match=message):
        files.read_json(tmp_path / "a.json")


def test_hash_is_of_the_bytes(tmp_path: Path):
    data = bytes(range(256)) * 9000  # more than one chunk
    (tmp_path / "a").write_bytes(data)
    assert files.sha256(tmp_path / "a") == hashlib.sha256(data).hexdigest()
