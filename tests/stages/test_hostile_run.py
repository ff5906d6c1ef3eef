"""A run that somebody else made: it cannot pass another result as ours, or have anything written outside."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from lowrank_compress.artifacts.files import sha256
from tests.runs import Tiny, contents, done, forked, lrc, refused

Finished = Callable[[str], Path]


@pytest.mark.parametrize(
    "name", ["adapter_config.json", "model.safetensors.index.json", "tokenizer.model", "pytorch_model.bin", "code.py"]
)
def test_what_would_be_loaded_with_a_checkpoint_is_no_note(tiny: Tiny, finished: Finished, name: str):
    run = finished("svd")
    (run / "model" / "notes.md").write_text("a note")
    assert done("verify", run, "--json").json["ok"]
    (run / "model" / name).write_text("{}")
    assert f"model/{name} (not of this checkpoint)" in lrc("verify", run).text
    for command in (["eval", run, "--perplexity", tiny.heldout], ["factorize", run], ["show", run]):
        assert "would be loaded with it. Move it elsewhere" in refused(*command)


def test_the_checkpoint_of_another_run_is_not_this_runs(tiny: Tiny, finished: Finished):
    run, other = finished("svd"), finished("svd-llm")
    shutil.rmtree(run / "model")
    shutil.copytree(other / "model", run / "model")
    said = lrc("verify", run)
    assert said.code == 2
    assert "model/manifest.json (of another result)" in said.text
    message = refused("eval", run, "--perplexity", tiny.heldout)
    assert "is not the checkpoint that run.json names" in message


@pytest.mark.parametrize("part", ["scores", "model"])
def test_a_whole_part_of_another_run_is_not_this_runs(part: str, finished: Finished):
    run, other = finished("svd"), finished("svd-llm")
    shutil.rmtree(run / part)
    shutil.copytree(other / part, run / part)
    states = {entry["file"]: entry["state"] for entry in lrc("verify", run, "--json").json["files"]}
    assert "of another result" in states.values()
    done("score" if part == "scores" else "factorize", run, "--overwrite")


def test_an_edited_report_is_not_shown(finished: Finished):
    run = finished("svd")
    path = run / "model" / "lowrank.json"
    path.write_text(path.read_text().replace('"method"', '"Method"'))
    assert "lowrank.json is missing or not as it was written" in refused("show", run)


def test_a_measurement_under_another_id_is_none(tiny: Tiny, finished: Finished):
    run = finished("svd")
    done("eval", run, "--perplexity", tiny.heldout)
    (made,) = (path.parent for path in run.glob("eval/*/metrics.json"))
    made.rename(made.with_name("0" * 64))
    assert "(of another result)" in lrc("verify", run).text
    done("eval", run, "--perplexity", tiny.heldout, "--limit", 1)
    assert "0" * 64 not in json.loads((run / "eval" / "metrics.json").read_text())["evaluations"]


@pytest.mark.parametrize("part", ["work", "eval"])
def test_a_part_that_is_a_link_is_not_written_through(tiny: Tiny, finished: Finished, tmp_path: Path, part: str):
    run = finished("svd")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "mine").write_text("precious")
    (run / part).symlink_to(tmp_path / "elsewhere")
    command = ["factorize", run, "--dtype", "bfloat16", "--overwrite"]
    if part == "eval":
        command = ["eval", run, "--perplexity", tiny.heldout]
    assert "is a link; expected a directory of the run itself" in refused(*command)
    assert contents(tmp_path / "elsewhere") == {"mine": sha256(tmp_path / "elsewhere" / "mine")}


def test_run_json_that_was_edited_is_kept_aside(finished: Finished):
    run = finished("svd")
    whole = (run / "run.json").read_text()
    (run / "run.json").write_text("mine")
    done("factorize", run)
    assert (run / "run.json").read_text() == whole
    assert (run / "run.json.bak").read_text() == "mine"


def test_the_demo_takes_no_foreign_directory(tmp_path: Path):
    (tmp_path / "svd-0.3").mkdir()
    (tmp_path / "svd-0.3" / "thesis.tex").write_text("precious")
    assert "is no run of this program" in refused("demo", "--out", tmp_path)
    assert [path.name for path in (tmp_path / "svd-0.3").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_new_scores_replace_old_ones_together(tiny: Tiny, finished: Finished, after: bool):
    """Whatever rename a process dies at: ranks, bases and manifest are of one result, the old or the new."""
    run = finished("svd")
    old = contents(run / "scores")
    rename, replace = os.rename, os.replace
    count = 0
    while True:
        count += 1

        def work(count: int = count) -> None:
            calls = 0

            def dying(real: Callable[..., None]) -> Callable[..., None]:
                def call(*arguments: object) -> None:
                    nonlocal calls
                    calls += 1
                    if calls == count and not after:
                        os._exit(9)
                    real(*arguments)
                    if calls == count:
                        os._exit(9)

                return call

            os.rename, os.replace = dying(rename), dying(replace)
            lrc("compress", *tiny.options(run, "svd"), "--ratio", 0.5, "--overwrite")

        status = forked(work)
        if status == 0:
            break
        lrc("score", run)  # of the recipe that is there by now, which it refuses; but it mends what must be first
        now = {name: digest for name, digest in contents(run / "scores").items() if not name.endswith(".bak")}
        manifest = json.loads((run / "scores" / "manifest.json").read_text())
        assert all(now[name] == entry["sha256"] for name, entry in manifest["outputs"].items())
        assert manifest["report"]["asked_ratio"] in (0.3, 0.5)
        if manifest["report"]["asked_ratio"] == 0.5:
            break
        assert {name: now[name] for name in old} == old
    assert count >= 3
