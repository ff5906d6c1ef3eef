"""What is not ours is never removed, overwritten or followed, and what was edited is never passed off as ours."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from lowrank_compress.artifacts.directories import refuse_unsafe
from lowrank_compress.artifacts.files import sha256
from lowrank_compress.errors import InputError
from tests.runs import Tiny, block_file, contents, done, lrc, refused, results

Finished = Callable[[str], Path]


@pytest.mark.parametrize("place", ["model", "scores", "stats", "."])
def test_notes_in_a_run_outlive_everything(tiny: Tiny, finished: Finished, place: str):
    run = finished("svd")
    (run / place / "notes.txt").write_text("precious")
    (run / place / "own").mkdir()
    (run / place / "own" / "thesis.tex").write_text("precious")
    (run / "model" / "manifest.json").unlink()
    done("compress", *tiny.options(run, "svd"))
    done("compress", *tiny.options(run, "svd"), "--ratio", 0.5, "--overwrite")
    done("compress", *tiny.options(run, "svd"), "--ratio", 0.4, "--dtype", "bfloat16", "--overwrite")
    assert (run / place / "notes.txt").read_text() == "precious"
    assert (run / place / "own" / "thesis.tex").read_text() == "precious"
    assert done("verify", run, "--json").json["ok"]


def test_what_was_changed_in_a_model_is_kept_when_it_is_replaced(tiny: Tiny, finished: Finished):
    run = finished("svd")
    (run / "model" / "README.md").write_text("my own card")
    assert "README.md is not as it was written" in refused("factorize", run)
    done("factorize", run, "--overwrite")
    assert (run / "model" / "README.md.bak").read_text() == "my own card"
    assert "my own card" not in (run / "model" / "README.md").read_text()


def test_an_old_model_stands_until_the_new_one_is_complete(
    tiny: Tiny, finished: Finished, monkeypatch: pytest.MonkeyPatch
):
    run = finished("svd")
    before = contents(run / "model")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lowrank_compress.stages.factorize.write_companions", full)
    assert lrc("factorize", run, "--dtype", "bfloat16", "--overwrite").code == 2
    assert contents(run / "model") == before
    assert sorted(path.name for path in run.iterdir() if "lrc-" in path.name) == []


@pytest.mark.parametrize("content", ["model: x\n", "# my own\nratio: 0.3\n", ""], ids=["foreign", "commented", "empty"])
def test_somebody_elses_recipe_makes_no_run(tiny: Tiny, tmp_path: Path, content: str):
    (tmp_path / "recipe.yaml").write_text(content)
    for more in ([], ["--overwrite"]):
        assert "is no recipe of a run" in refused("compress", *tiny.options(tmp_path, "svd"), *more)
    assert contents(tmp_path) == {"recipe.yaml": sha256(tmp_path / "recipe.yaml")}
    for command in ("score", "factorize", "verify"):
        assert "is no run" in refused(command, tmp_path)


def test_a_commented_recipe_of_a_run_stays(tiny: Tiny, finished: Finished):
    run = finished("svd")
    commented = (run / "recipe.yaml").read_text() + "# the one for the paper\n"
    (run / "recipe.yaml").write_text(commented)
    done("compress", *tiny.options(run, "svd"))
    assert (run / "recipe.yaml").read_text() == commented
    done("compress", *tiny.options(run, "svd"), "--ratio", 0.5, "--overwrite")
    assert (run / "recipe.yaml.bak").read_text() == commented


@pytest.fixture
def exported(finished: Finished, tmp_path: Path) -> tuple[Path, Path]:
    """A run, and its dense export."""
    run, out = finished("svd"), tmp_path / "dense"
    done("export", run, "--dense", out)
    return run, out


def test_an_export_replaces_what_it_wrote_and_nothing_else(exported: tuple[Path, Path]):
    run, out = exported
    before = contents(out)
    (out / "config.json").write_text("{}")
    (out / ".git").mkdir()
    (out / ".git" / "HEAD").write_text("thesis")
    (out.parent / "dense.partial").mkdir()
    (out.parent / "dense.partial" / "mine").write_text("precious")
    done("export", run, "--dense", out, "--overwrite")
    found = contents(out)
    assert (out / "config.json.bak").read_text() == "{}"
    assert (out / ".git" / "HEAD").read_text() == "thesis"
    assert (out.parent / "dense.partial" / "mine").read_text() == "precious"
    assert {name: found[name] for name in before} == before


def test_a_checkpoint_that_is_no_export_is_not_replaced(tiny: Tiny, exported: tuple[Path, Path], tmp_path: Path):
    shutil.copytree(tiny.model, tmp_path / "mine")
    before = contents(tmp_path / "mine")
    message = refused("export", exported[0], "--dense", tmp_path / "mine", "--overwrite")
    assert "is no export of this program" in message
    assert contents(tmp_path / "mine") == before


def test_no_export_over_what_matters(
    tiny: Tiny, exported: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run, _ = exported
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "link").symlink_to(tiny.model)
    before = contents(tmp_path) | contents(tiny.model)
    unsafe = ("", ".", "..", "/", tmp_path, run, run.parent, run / "model", run / "model" / "new", tiny.model)
    for out in (*unsafe, tmp_path / "home", tmp_path / "link", tiny.model / "new"):
        assert lrc("export", run, "--dense", out, "--overwrite").code == 2, out
    assert contents(tmp_path) | contents(tiny.model) == before


def test_an_export_that_fails_leaves_the_old_one(exported: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch):
    run, out = exported
    before = contents(out.parent)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lowrank_compress.model.dense.write_companions", full)
    assert "disk is full" in refused("export", run, "--dense", out, "--overwrite")
    assert contents(out.parent) == before


def test_unsafe_places_are_told(tmp_path: Path):
    (tmp_path / "a").mkdir()
    with pytest.raises(InputError, match="is, holds or lies in the source"):
        refuse_unsafe(tmp_path, "--out", the_source=tmp_path / "a")
    refuse_unsafe(tmp_path / "b", "--out", the_source=tmp_path / "a")


@pytest.mark.parametrize(
    "name", [".lock", ".lock.pid", "run.json", "recipe.yaml", "scores/ranks.json", "stats/manifest.json"]
)
def test_planted_links_are_not_followed(tiny: Tiny, finished: Finished, tmp_path: Path, name: str):
    run = finished("svd")
    (tmp_path / "target").write_text("precious")
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(tmp_path / "target")
    shutil.rmtree(run / "model")
    lrc("compress", *tiny.options(run, "svd"), "--overwrite")
    assert (tmp_path / "target").read_text() == "precious"


@pytest.mark.parametrize("stage", ["scores", "model"])
def test_a_stage_that_is_a_link_is_refused(tiny: Tiny, finished: Finished, tmp_path: Path, stage: str):
    run = finished("svd")
    shutil.rmtree(run / stage)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "manifest.json").write_text("precious")
    (run / stage).symlink_to(tmp_path / "elsewhere")
    refused("compress", *tiny.options(run, "svd"), "--overwrite")
    assert contents(tmp_path / "elsewhere") == {"manifest.json": sha256(tmp_path / "elsewhere" / "manifest.json")}


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def test_verify_sees_every_edit(tiny: Tiny, finished: Finished):
    run = finished("svd")
    done("eval", run, "--perplexity", tiny.heldout)
    (metrics,) = run.glob("eval/*/metrics.json")
    value = json.loads(metrics.read_text())["perplexity"][str(tiny.heldout)]["compressed"]
    assert done("verify", run, "--json").json["ok"]
    for path, old, new in (
        (metrics, str(value), "1.25"),
        (run / "eval" / "metrics.json", str(value), "1.25"),
        (run / "run.json", '"schema": 2', '"schema": 3'),
        (run / "model" / "manifest.json", '"threads": ', '"threads": 1'),
        (run / "scores" / "manifest.json", '"asked_ratio": 0.3', '"asked_ratio": 0.4'),
    ):
        whole = path.read_text()
        edit(path, old, new)
        assert lrc("verify", run).code == 2, path
        path.write_text(whole)
    assert done("verify", run, "--json").json["ok"]


def test_an_edited_measurement_is_measured_again(tiny: Tiny, finished: Finished):
    run = finished("svd")
    first = done("eval", run, "--perplexity", tiny.heldout, "--json").json
    (metrics,) = run.glob("eval/*/metrics.json")
    edit(metrics, str(first["perplexity"][str(tiny.heldout)]["compressed"]), "1.2345")
    assert done("eval", run, "--perplexity", tiny.heldout, "--json").json == first


@pytest.mark.parametrize("command", ["compress", "factorize", "eval", "export", "bench"])
def test_nothing_is_built_on_a_changed_factor(tiny: Tiny, finished: Finished, tmp_path: Path, command: str):
    run = finished("svd")
    path = run / "model" / "model.safetensors"
    stat = path.stat()
    data = bytearray(path.read_bytes())
    data[-5] ^= 64
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as if nothing had happened
    arguments = {
        "compress": tiny.options(run, "svd"),
        "factorize": [run],
        "eval": [run, "--perplexity", tiny.heldout],
        "export": [run, "--dense", tmp_path / "dense"],
        "bench": [run, "--rounds", 1, "--new-tokens", 1, "--prompt-tokens", 4],
    }
    assert "model.safetensors is" in (message := refused(command, *arguments[command]))
    assert "not as it was written" in message


def test_a_changed_weight_of_equal_size_and_time_is_another_checkpoint(tiny: Tiny, tmp_path: Path):
    model = tmp_path / "model"
    shutil.copytree(tiny.model, model)
    options = [model, *tiny.options(tmp_path / "run", "svd")[1:]]
    done("compress", *options)
    path = model / "model.safetensors"
    stat = path.stat()
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert "inputs.calibration is" in refused("compress", *options)


def test_a_recipe_cannot_have_code_run(tiny: Tiny, finished: Finished, tmp_path: Path):
    run = finished("svd")
    (tmp_path / "r.yaml").write_text((run / "recipe.yaml").read_text() + "trust_remote_code: true\n")
    for more in ([], ["--dry-run"]):
        message = refused("compress", "--config", tmp_path / "r.yaml", "--out", tmp_path / "new", *more)
        assert "pass --trust-remote-code if you trust the checkpoint" in message
    edit(run / "recipe.yaml", "ratio:", "trust_remote_code: true\nratio:")
    for command in ("score", "factorize"):
        assert "Only the command line may say so" in refused(command, run)
        done(command, run, "--trust-remote-code")
    assert results(run)


def test_pipes_in_a_run_are_refused_at_once(tiny: Tiny, finished: Finished):
    for name in ("recipe.yaml", "run.json", "scores/ranks.json", "scores/manifest.json", "model/manifest.json"):
        run = finished("svd")
        (run / name).unlink()
        os.mkfifo(run / name)
        for command in (["eval", run, "--perplexity", tiny.heldout], ["verify", run], ["factorize", run]):
            # One writes run.json anew, and the other reads no scores.
            fine = (command[0], name.split("/")[0]) in (("factorize", "run.json"), ("eval", "scores"))
            assert lrc(*command).code == (0 if fine else 2), (name, command)
        shutil.rmtree(run)
    run = finished("svd")
    block = block_file(run / "scores", "basis", 0)
    block.unlink()
    os.mkfifo(block)
    assert lrc("factorize", run, "--overwrite").code == 2
