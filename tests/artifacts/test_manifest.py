"""The manifest is the commit marker, and its id is the hash of what changes the result."""

import json
from pathlib import Path

import pytest

from lowrank_compress.artifacts import manifest
from lowrank_compress.artifacts.manifest import MANIFEST, Key
from lowrank_compress.errors import ArtifactError

KEY = Key("score", 1, {"ratio": 0.3, "options": {"floor": 0.0, "seed": 1}}, {"calibration": "abc"})


def commit(directory: Path, key: Key = KEY) -> manifest.Manifest:
    directory.mkdir(exist_ok=True)
    (directory / "ranks").write_text("1")
    return manifest.commit(directory, key, ["ranks"], {"tokens": 3}, {"threads": 1})


def test_id_ignores_the_order_of_keys_and_nothing_else():
    same = Key("score", 1, {"options": {"seed": 1, "floor": 0.0}, "ratio": 0.3}, {"calibration": "abc"})
    others = [
        Key("calibrate", 1, KEY.config, KEY.inputs),
        Key("score", 2, KEY.config, KEY.inputs),
        Key("score", 1, {**KEY.config, "ratio": 0.30000001}, KEY.inputs),
        Key("score", 1, {**KEY.config, "options": {"floor": 0.0}}, KEY.inputs),
        Key("score", 1, KEY.config, {"calibration": "abd"}),
    ]
    assert same.id == KEY.id
    assert len({KEY.id, *(other.id for other in others)}) == len(others) + 1


def test_what_was_committed_is_read_back(tmp_path: Path):
    written = commit(tmp_path / "stage")
    assert manifest.read_manifest(tmp_path / "stage") == written
    assert manifest.committed(tmp_path / "stage", KEY) == written
    assert set(written.outputs) == {"ranks"}
    assert written.outputs["ranks"]["size"] == 1


def test_a_directory_without_a_manifest_is_not_committed(tmp_path: Path):
    (tmp_path / "ranks").write_text("1")
    assert manifest.committed(tmp_path, KEY) is None
    assert (tmp_path / "ranks").exists()


def test_report_and_environment_are_not_in_the_id(tmp_path: Path):
    assert manifest.commit(tmp_path, KEY, [], {"a": 1}, {"b": 2}).id == KEY.id


@pytest.mark.parametrize(
    "change", [{"id": "0" * 64}, {"key": {"stage": "score"}}, {"outputs": None, "key": None}], ids=["id", "key", "none"]
)
def test_a_damaged_manifest_is_an_error_and_overwrite_removes_its_stage(tmp_path: Path, change: dict):
    stage = tmp_path / "stage"
    commit(stage)
    found = json.loads((stage / MANIFEST).read_text())
    (stage / MANIFEST).write_text(json.dumps(found | change))
    with pytest.raises(ArtifactError, match=r"manifest\.json is damaged .* --overwrite"):
        manifest.committed(stage, KEY)
    assert manifest.committed(stage, KEY, overwrite=True) is None
    assert not stage.exists()


def test_another_result_is_refused_by_the_first_key_that_differs(tmp_path: Path):
    stage = tmp_path / "stage"
    commit(stage)
    other = Key("score", 1, {"ratio": 0.3, "options": {"floor": 0.1, "seed": 2}}, {"calibration": "abc"})
    with pytest.raises(ArtifactError, match=r"config\.options\.floor is 0\.0 there and 0\.1 here.*--overwrite"):
        manifest.committed(stage, other)
    assert stage.exists()
    assert manifest.committed(stage, other, overwrite=True) is None
    assert not stage.exists()


def test_overwrite_keeps_the_same_result(tmp_path: Path):
    written = commit(tmp_path)
    assert manifest.committed(tmp_path, KEY, overwrite=True) == written


def test_difference_sees_keys_of_either_side():
    assert manifest.difference({"a": 1}, {"a": 1, "b": 2}) == "b is None there and 2 here"
    assert manifest.difference({"a": 1, "b": 2}, {"a": 1}) == "b is 2 there and None here"
    assert manifest.difference({"a": {"x": 1}}, {"a": 3}) == "a is {'x': 1} there and 3 here"


@pytest.mark.parametrize("damage", ["same size", "longer", "gone"])
def test_altered_outputs_are_named(tmp_path: Path, damage: str):
    written = commit(tmp_path)
    assert manifest.altered(tmp_path, written) == []
    if damage == "gone":
        (tmp_path / "ranks").unlink()
    else:
        (tmp_path / "ranks").write_text("2" if damage == "same size" else "11")
    assert manifest.altered(tmp_path, written) == ["ranks"]
