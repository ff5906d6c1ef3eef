"""The model code in a checkpoint: told from the package's, and renewed."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lowrank_compress.artifacts.documents import read_sealed
from lowrank_compress.artifacts.lock import locked
from lowrank_compress.artifacts.manifest import MANIFEST, commit, read_manifest
from lowrank_compress.shipped.config import REMOTE_FILE, VERSION
from lowrank_compress.shipped.saving import remote_code
from tests.runs import Tiny, contents, done, lrc, refused

Finished = Callable[[str], Path]


def as_written_by(run: Path, code: str, version: str = "0.1.0") -> Path:
    """Make a run's checkpoint one that an installation with other model code wrote."""
    model = run / "model"
    manifest = read_manifest(model)
    assert manifest is not None
    (model / REMOTE_FILE).write_text(code)
    commit(model, manifest.key, manifest.outputs, manifest.report, manifest.environment | {"lowrank_compress": version})
    return model


def older() -> str:
    code = remote_code().decode()
    assert f"\nVERSION = {VERSION}\n" in code
    return code.replace(f"\nVERSION = {VERSION}\n", "\nVERSION = 1\n")


def states(run: Path) -> dict[str, str]:
    return {finding["file"]: finding["state"] for finding in done("verify", run, "--json").json["files"]}


@pytest.mark.parametrize("target", ["", "model"])
def test_older_code_is_said_and_renewed_and_nothing_else_is_touched(finished: Finished, target: str) -> None:
    run = finished("svd")
    model = as_written_by(run, older())
    said = done("verify", run)
    assert "older code" in said.out
    assert "lrc refresh" in said.out
    found = done("verify", run, "--json").json
    assert found["ok"] is True
    assert f"`lrc refresh {run}` renews it" in found["notes"][0]
    assert states(run)[f"model/{REMOTE_FILE}"] == "older code"
    before, manifest = contents(run), read_sealed(model / MANIFEST)
    found = done("refresh", run / target, "--json").json
    assert found == {"file": str(model / REMOTE_FILE), "refreshed": True, "kept": None}
    assert (model / REMOTE_FILE).read_bytes() == remote_code()
    after = contents(run)
    assert {name for name in after if after[name] != before.get(name)} == {f"model/{REMOTE_FILE}", f"model/{MANIFEST}"}
    assert before.keys() == after.keys()
    now = read_sealed(model / MANIFEST)
    assert now["outputs"].pop(REMOTE_FILE) != manifest["outputs"].pop(REMOTE_FILE)
    assert now == manifest
    assert set(states(run).values()) <= {"intact", "dropped"}
    assert done("verify", run, "--json").json["notes"] == []
    assert done("refresh", run, "--json").json["refreshed"] is False
    assert contents(run) == after


def test_a_renewed_run_is_the_same_run(finished: Finished, tiny: Tiny) -> None:
    run = finished("svd")
    as_written_by(run, older())
    done("refresh", run)
    before = contents(run)
    done("compress", *tiny.options(run, "svd"))
    assert contents(run) == before
    assert torch.isfinite(AutoModelForCausalLM.from_pretrained(run / "model")(torch.arange(4, 12)[None]).logits).all()


def test_a_refresh_that_was_killed_is_finished(finished: Finished) -> None:
    """Between the file and the manifest; and with the file gone."""
    run = finished("svd")
    model = as_written_by(run, older())
    (model / REMOTE_FILE).write_bytes(remote_code())
    assert lrc("verify", run).code == 2
    assert done("refresh", run, "--json").json == {"file": str(model / REMOTE_FILE), "refreshed": True, "kept": None}
    assert set(states(run).values()) <= {"intact", "dropped"}
    (model / REMOTE_FILE).unlink()
    assert done("refresh", run, "--json").json["refreshed"] is True
    assert set(states(run).values()) <= {"intact", "dropped"}


def test_code_that_nobody_knows_to_be_ours_is_kept(finished: Finished, tmp_path: Path) -> None:
    run = finished("svd")
    (run / "model" / REMOTE_FILE).write_text("# my notes\n")
    said = done("refresh", run)
    assert (run / "model" / f"{REMOTE_FILE}.bak").read_text() == "# my notes\n"
    assert f"{REMOTE_FILE}.bak" in said.out
    assert set(states(run).values()) <= {"intact", "dropped"}
    plain = tmp_path / "plain"
    shutil.copytree(run / "model", plain)
    (plain / MANIFEST).unlink()
    (plain / f"{REMOTE_FILE}.bak").unlink()
    (plain / REMOTE_FILE).write_text(older())
    assert done("refresh", plain, "--json").json["kept"] == str(plain / f"{REMOTE_FILE}.bak")
    assert (plain / REMOTE_FILE).read_bytes() == remote_code()
    assert (plain / f"{REMOTE_FILE}.bak").read_text() == older()
    assert not (plain / MANIFEST).exists()


@pytest.mark.parametrize(
    ("code", "version"),
    [(remote_code().decode().replace(f"\nVERSION = {VERSION}\n", "\nVERSION = 99\n"), "0.1.0"), (older(), "7.0")],
)
def test_newer_code_stays(finished: Finished, code: str, version: str) -> None:
    run = finished("svd")
    model = as_written_by(run, code, version)
    assert states(run)[f"model/{REMOTE_FILE}"] == "newer code"
    assert "update lowrank_compress" in " ".join(done("verify", run).out.split())
    before = contents(run)
    assert "is of a later version of this program than" in refused("refresh", run)
    assert contents(run) == before
    assert (model / REMOTE_FILE).read_text() == code


def edit_config(model: Path, **changes: object) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | changes))


def test_what_is_not_ours_is_refused(finished: Finished, tiny: Tiny, tmp_path: Path) -> None:
    assert "There is no directory" in refused("refresh", tmp_path / "nowhere")
    assert "There is no directory" in refused("refresh", "somebody/some-model")
    assert "is not compressed by this program" in refused("refresh", tiny.model)
    (tmp_path / "empty").mkdir()
    assert "config.json" in refused("refresh", tmp_path / "empty")
    run = finished("svd")
    model = tmp_path / "checkpoint"
    shutil.copytree(run / "model", model)
    config = json.loads((model / "config.json").read_text())
    for changes, message in (
        ({"quantization_config": config["quantization_config"] | {"version": VERSION + 1}}, "by a later version"),
        (
            {"auto_map": {"AutoModel": "modeling_lowrank.LowRankForTomorrow"}},
            "names modeling_lowrank.LowRankForTomorrow",
        ),
        ({"auto_map": {"AutoModel": "modeling_mine.Mine"}}, f"names no class of {REMOTE_FILE}"),
    ):
        edit_config(model, **changes)
        before = contents(model)
        assert message in refused("refresh", model)
        assert contents(model) == before
        edit_config(model, **config)
    edit_config(run / "model", note=1)
    assert "config.json is missing or not as it was written" in refused("refresh", run)
    precious = tmp_path / "precious.py"
    precious.write_text("precious")
    (model / REMOTE_FILE).unlink()
    (model / REMOTE_FILE).symlink_to(precious)
    assert "is a link, or no file" in refused("refresh", model)
    assert precious.read_text() == "precious"


def test_a_run_in_use_is_left_alone(finished: Finished) -> None:
    run = finished("svd")
    as_written_by(run, older())
    before = contents(run)
    with locked(run):
        for target in (run, run / "model"):
            assert re.search("in use by another process", refused("refresh", target))
    assert contents(run) == before


def test_an_older_config_is_led_to_the_code(finished: Finished, tiny: Tiny) -> None:
    """Checkpoints of the first versions have no AutoConfig in their auto_map."""
    run = finished("svd")
    model = as_written_by(run, older())
    settings = json.loads((model / "config.json").read_text())
    whole = dict(settings["auto_map"])
    del settings["auto_map"]["AutoConfig"]
    (model / "config.json").write_text(json.dumps(settings))
    manifest = read_manifest(model)
    assert manifest is not None
    commit(model, manifest.key, manifest.outputs, manifest.report, manifest.environment)
    assert done("refresh", run, "--json").json["refreshed"] is True
    assert json.loads((model / "config.json").read_text()) == settings | {"auto_map": whole}
    assert set(states(run).values()) <= {"intact", "dropped"}
    assert done("refresh", run, "--json").json["refreshed"] is False
    done("compress", *tiny.options(run, "svd"))
    # One that somebody has changed stays as it is.
    changed = json.dumps(settings | {"mine": 1})
    (model / "config.json").write_text(changed)
    lrc("refresh", model)
    assert (model / "config.json").read_text() == changed
