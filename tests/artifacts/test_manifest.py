"""The manifest is the commit marker, and its id is the hash of what changes the result."""

import json
import os
from pathlib import Path

import pytest

from lowrank_compress.artifacts import manifest
from lowrank_compress.artifacts.directories import CHANGED
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
    "change",
    [
        {"id": "0" * 64},
        {"key": {"stage": "score"}},
        {"outputs": None, "key": None},
        {"report": {"tokens": 4}},
        {"environment": {}},
    ],
    ids=["id", "key", "none", "report", "environment"],
)
def test_a_damaged_manifest_is_an_error_that_overwrite_passes_over(tmp_path: Path, change: dict):
    stage = tmp_path / "stage"
    commit(stage)
    found = json.loads((stage / MANIFEST).read_text())
    (stage / MANIFEST).write_text(json.dumps(found | change))
    with pytest.raises(ArtifactError, match=r"manifest\.json is not as it was written .* --overwrite"):
        manifest.committed(stage, KEY)
    assert manifest.committed(stage, KEY, overwrite=True) is None
    assert (stage / "ranks").exists()


def test_another_result_is_refused_by_the_first_key_that_differs(tmp_path: Path):
    stage = tmp_path / "stage"
    commit(stage)
    other = Key("score", 1, {"ratio": 0.3, "options": {"floor": 0.1, "seed": 2}}, {"calibration": "abc"})
    with pytest.raises(ArtifactError, match=r"config\.options\.floor is 0\.0 there and 0\.1 here.*--overwrite"):
        manifest.committed(stage, other)
    before = {path.name: path.read_bytes() for path in stage.iterdir()}
    assert manifest.committed(stage, other, overwrite=True) is None
    assert {path.name: path.read_bytes() for path in stage.iterdir()} == before


def test_what_the_new_result_lacks_goes_when_it_is_complete_and_nothing_else(tmp_path: Path):
    (tmp_path / "edited").write_text("ours")
    (tmp_path / "old").write_text("ours")
    (tmp_path / "both").write_text("ours")
    manifest.commit(tmp_path, KEY, ["edited", "old", "both"], {}, {})
    (tmp_path / "edited").write_text("theirs")
    (tmp_path / "notes").write_text("theirs")
    manifest.commit(tmp_path, Key("score", 2, {}, {}), ["both"], {}, {})
    assert {path.name for path in tmp_path.iterdir()} == {"both", "edited", "notes", MANIFEST}


def test_a_result_with_a_changed_file_is_refused_by_its_name(tmp_path: Path):
    commit(tmp_path)
    (tmp_path / "ranks").write_text("2")
    with pytest.raises(ArtifactError, match="ranks is not as it was written"):
        manifest.committed(tmp_path, KEY)
    assert manifest.committed(tmp_path, KEY, editable=("ranks",)) is not None
    assert manifest.committed(tmp_path, KEY, overwrite=True) is None


def test_names_that_lead_elsewhere_are_refused(tmp_path: Path):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "stage").mkdir()
    (tmp_path / "stage" / "ranks").write_text("1")
    manifest.commit(tmp_path / "stage", KEY, ["../precious"], {}, {})
    assert manifest.listed(tmp_path / "stage") == {}


def test_overwrite_keeps_the_same_result(tmp_path: Path):
    written = commit(tmp_path)
    assert manifest.committed(tmp_path, KEY, overwrite=True) == written


def test_difference_sees_keys_of_either_side():
    assert manifest.difference({"a": 1}, {"a": 1, "b": 2}) == "b is None there and 2 here"
    assert manifest.difference({"a": 1, "b": 2}, {"a": 1}) == "b is 2 there and None here"
    assert manifest.difference({"a": {"x": 1}}, {"a": 3}) == "a is {'x': 1} there and 3 here"


def test_a_file_of_another_size_is_not_read_to_know_that_it_is_another(tmp_path: Path):
    written = commit(tmp_path)
    os.truncate(tmp_path / "ranks", 1 << 40)  # hashing it would take an hour
    assert manifest.listed(tmp_path) == {"ranks": CHANGED, MANIFEST: ""}
    for remember in (True, False):
        assert manifest.altered(tmp_path, written, remember=remember) == ["ranks"]


@pytest.mark.parametrize("damage", ["same size", "longer", "gone"])
def test_altered_outputs_are_named(tmp_path: Path, damage: str):
    written = commit(tmp_path)
    assert manifest.altered(tmp_path, written) == []
    if damage == "gone":
        (tmp_path / "ranks").unlink()
    else:
        (tmp_path / "ranks").write_text("2" if damage == "same size" else "11")
    assert manifest.altered(tmp_path, written) == ["ranks"]
