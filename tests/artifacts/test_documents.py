"""JSON is read back as it was written, or refused by name."""

from pathlib import Path

import pytest

from lowrank_compress.artifacts import documents
from lowrank_compress.errors import ArtifactError


def test_a_path_that_is_not_utf8_is_read_back_as_it_was(tmp_path: Path):
    value = {"base": "/models/\udcff", "é": "漢"}
    documents.write_sealed(tmp_path / "a.json", value)
    assert documents.read_sealed(tmp_path / "a.json") == value


def test_json_keeps_order_and_letters(tmp_path: Path):
    documents.write_json(tmp_path / "a.json", {"b": 1, "a": "é"})
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == '{\n  "b": 1,\n  "a": "é"\n}\n'
    assert documents.read_json(tmp_path / "a.json") == {"b": 1, "a": "é"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        (b"{", "cannot be read as JSON"),
        (b"\xff", "is not UTF-8"),
        (b'{"a": 1, "a": 2}', "the key 'a' is there twice"),
        (b"[" * 100_000, "nested too deep"),
        (b"[]", "JSON list; expected an object"),
    ],
)
def test_what_is_no_json_object_is_refused(tmp_path: Path, content: bytes | None, message: str):
    if content is not None:
        (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ArtifactError, match=message):
        documents.read_json(tmp_path / "a.json")


def test_a_sealed_file_that_was_edited_is_refused(tmp_path: Path):
    path = tmp_path / "a.json"
    documents.write_sealed(path, {"model": "model", "n": 1.5})
    assert documents.read_sealed(path) == {"model": "model", "n": 1.5}
    path.write_text(path.read_text().replace("1.5", "1.6"))
    with pytest.raises(ArtifactError, match="is not as it was written"):
        documents.read_sealed(path)
    documents.write_json(path, {"model": "model", "n": 1.5})
    with pytest.raises(ArtifactError, match="has no hash of itself"):
        documents.read_sealed(path)


def test_what_to_do_is_the_readers_to_say(tmp_path: Path):
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(ArtifactError, match=r"cannot be read as JSON .*Download it again"):
        documents.read_json(tmp_path / "a.json", mend="Download it again.")


def test_a_key_twice_is_the_last_one_where_others_have_it_so(tmp_path: Path):
    (tmp_path / "a.json").write_text('{"a": 1, "a": 2}')
    assert documents.read_json(tmp_path / "a.json", unique=False) == {"a": 2}
