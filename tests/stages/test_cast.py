"""A stage that makes a checkpoint from a checkpoint: in a run the last link of its chain, elsewhere on its own."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lowrank_compress.artifacts import files
from lowrank_compress.artifacts.manifest import read_manifest
from lowrank_compress.evaluation.size import measure_size
from lowrank_compress.formats.table import FORMATS
from lowrank_compress.model.checkpoint import Checkpoint
from lowrank_compress.stages.index import read_index
from tests.runs import Tiny, contents, done, forked, lrc, refused, results, times
from tests.stages.test_workers import ended, start

Finished = Callable[[str], Path]


def chain(run: Path) -> list[str]:
    """Name the links of a run's chain, each of which must be what its directory holds."""
    found = read_index(run / "run.json").chain
    for link in found:
        manifest = read_manifest(run / link.directory)
        assert manifest is None or manifest.id == link.id
    return [link.stage for link in found]


def cast(run: Path, dtype: str = "bfloat16", *more: object) -> dict[str, object]:
    return done("cast", run, "--dtype", dtype, "--json", *more).json


@pytest.mark.slow
@pytest.mark.parametrize("method", ["svd", "auto"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_every_tensor_is_rounded_and_nothing_else_changes(finished: Finished, method: str, dtype: str):
    run = finished(method)
    before = results(run)
    said = cast(run, dtype)
    assert said["model"] == str(run / "cast")
    assert results(run) == before
    wide, narrow = (load_file(run / name / "model.safetensors") for name in ("model", "cast"))
    assert wide.keys() == narrow.keys()
    for name, tensor in wide.items():
        expected = tensor.to(getattr(torch, dtype)) if tensor.is_floating_point() else tensor
        assert expected.dtype == narrow[name].dtype
        assert torch.equal(expected, narrow[name]), name
    settings = [json.loads((run / name / "config.json").read_text()) for name in ("model", "cast")]
    assert settings[1] == settings[0] | {"dtype": dtype}
    loaded = AutoModelForCausalLM.from_pretrained(run / "cast")
    assert loaded.dtype == getattr(torch, dtype)
    assert torch.isfinite(loaded(torch.arange(4, 12)[None]).logits).all()


@pytest.mark.parametrize(
    ("method", "options"),
    [
        *(("svd", ["--storage", storage]) for storage in FORMATS if storage != "auto"),
        ("modegpt", []),
        *((method, ["--ratio-of", "model", "--ratio", 0.2]) for method in ("svd", "modegpt")),
    ],
    ids=str,
)
def test_the_report_is_that_of_a_run_with_this_dtype(tiny: Tiny, tmp_path: Path, method: str, options: list[object]):
    run, direct = tmp_path / "run", tmp_path / "direct"
    done("compress", *tiny.options(run, method), *options)
    done("compress", *tiny.options(direct, method), *options, "--dtype", "bfloat16")
    cast(run)
    found, expected = (json.loads((path / "lowrank.json").read_text()) for path in (run / "cast", direct / "model"))
    for matrix in [*found["matrices"].values(), *expected["matrices"].values()]:
        matrix.pop("predicted_loss")
    assert found.pop("reached_ratio_bytes") == pytest.approx(expected.pop("reached_ratio_bytes"), abs=1e-12)
    assert found == expected
    assert found["stored_bytes"] == measure_size(Checkpoint(run / "cast")).block_bytes
    for path in (run / "cast", direct / "model"):
        assert f"became {expected['stored_bytes']:,})" in (path / "README.md").read_text()


def test_the_final_checkpoint_is_the_cast_one(tiny: Tiny, finished: Finished, tmp_path: Path):
    run = finished("svd")
    before = done("eval", run, "--perplexity", tiny.heldout, "--json").json["size"]
    cast(run)
    assert chain(run) == ["factorize", "cast"]
    after = done("eval", run, "--perplexity", tiny.heldout, "--json").json["size"]
    assert after["bytes"]["compressed"] == before["bytes"]["compressed"] // 2
    assert after["asked_ratio"] == before["asked_ratio"]
    assert done("show", run, "--json").json["dtype"] == "bfloat16"
    done("export", run, "--dense", tmp_path / "dense")
    assert json.loads((tmp_path / "dense" / "config.json").read_text())["dtype"] == "bfloat16"
    assert done("refresh", run, "--json").json["file"].startswith(str(run / "cast"))
    assert done("refresh", run / "model", "--json").json["file"].startswith(str(run / "model"))
    bench = done("bench", run, "--rounds", 1, "--new-tokens", 1, "--prompt-tokens", 4, "--batch-size", 1, "--json").json
    assert str(run / "cast") in [model["path"] for model in bench["models"].values()]
    found = done("verify", run, "--json").json
    assert found["ok"]
    assert {"stage": "cast", "file": "cast/model.safetensors", "state": "intact"} in found["files"]


def test_a_second_cast_does_nothing(finished: Finished):
    run = finished("svd")
    cast(run)
    before = times(run)
    cast(run)
    assert times(run) == before | {name: time for name, time in times(run).items() if name == ".lock"}


def test_another_dtype_is_refused_and_overwrite_starts_from_the_same(finished: Finished, tmp_path: Path):
    run, other = finished("svd"), tmp_path / "other"
    shutil.copytree(run, other)
    cast(run)
    message = refused("cast", run, "--dtype", "float16")
    assert "config.dtype is 'bfloat16' there and 'float16' here" in message
    assert "--overwrite" in message
    cast(run, "float16", "--overwrite")
    cast(other, "float16")
    assert contents(run / "cast") == contents(other / "cast")
    assert chain(run) == ["factorize", "cast"]


def test_a_rerun_of_the_recipe_keeps_what_was_made_from_it(tiny: Tiny, finished: Finished):
    run = finished("svd")
    cast(run)
    for command in (["compress", *tiny.options(run, "svd")], ["factorize", run]):
        done(*command)
        assert chain(run) == ["factorize", "cast"]
    shutil.rmtree(run / "model")  # it is not needed any more
    assert done("show", run, "--json").json["dtype"] == "bfloat16"
    done("compress", *tiny.options(run, "svd"))
    assert chain(run) == ["factorize", "cast"]


def test_what_was_made_from_another_result_is_never_the_final_checkpoint(tiny: Tiny, finished: Finished):
    run = finished("svd")
    cast(run)
    kept = contents(run / "cast")
    said = done("compress", *tiny.options(run, "svd"), "--ratio", 0.5, "--overwrite")
    assert "cast was made from another result" in said.text
    assert chain(run) == ["factorize"]
    assert done("show", run, "--json").json["asked_ratio"] == 0.5
    assert contents(run / "cast") == kept
    found = lrc("verify", run)
    assert found.code == 2
    assert "cast/manifest.json (of another result)" in found.text
    assert "Repeat the cast stage with --overwrite" in found.text
    assert "inputs.checkpoint is" in refused("cast", run, "--dtype", "bfloat16")
    cast(run, "bfloat16", "--overwrite")
    assert done("verify", run, "--json").json["ok"]
    # Back to the first result, of which the cast is gone by now.
    done("compress", *tiny.options(run, "svd"), "--overwrite")
    assert chain(run) == ["factorize"]
    cast(run, "bfloat16", "--overwrite")
    assert contents(run / "cast") == kept


def test_a_checkpoint_replaced_behind_the_chain_is_noticed(tiny: Tiny, finished: Finished):
    run, other = finished("svd"), finished("svd-llm")
    cast(run)
    shutil.rmtree(run / "model")
    shutil.copytree(other / "model", run / "model")
    for command in (["eval", run, "--perplexity", tiny.heldout], ["show", run], ["cast", run, "--dtype", "bfloat16"]):
        assert "is not the checkpoint that run.json names" in refused(*command)
    assert lrc("verify", run).code == 2


@pytest.mark.parametrize("name", ["cast/model.safetensors", "cast/config.json", "cast/lowrank.json"])
def test_a_changed_file_is_found_and_repaired(tiny: Tiny, finished: Finished, name: str):
    run = finished("svd")
    cast(run)
    whole = contents(run / "cast")
    data = bytearray((run / name).read_bytes())
    data[len(data) // 2] ^= 1
    (run / name).write_bytes(data)
    said = lrc("verify", run)
    assert said.code == 2
    assert f"the first {name} (missing or altered)" in said.text
    for command in (["eval", run, "--perplexity", tiny.heldout], ["export", run, "--dense", run.parent / "dense"]):
        assert "not as it was written" in refused(*command)
    assert "not as it was written" in refused("cast", run, "--dtype", "bfloat16")
    cast(run, "bfloat16", "--overwrite")
    assert {name: digest for name, digest in contents(run / "cast").items() if not name.endswith(".bak")} == whole
    assert (run / f"{name}.bak").read_bytes() == data


def test_what_would_be_loaded_with_it_is_seen(finished: Finished):
    run = finished("svd")
    cast(run)
    (run / "cast" / "adapter_config.json").write_text("{}")
    assert "cast/adapter_config.json (not of this checkpoint)" in lrc("verify", run).text
    assert "would be loaded with it" in refused("show", run)


@pytest.mark.slow
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_killed_at_each_rename(finished: Finished, tmp_path: Path, after: bool):
    run, whole = finished("svd"), tmp_path / "whole"
    shutil.copytree(run, whole)
    cast(whole)
    rename, replace = os.rename, os.replace
    for count in range(1, 100):

        def work(count: int = count) -> None:
            calls = 0

            def dying(real: Callable[..., None]) -> Callable[..., None]:
                def call(*arguments: object) -> None:
                    nonlocal calls
                    calls += 1
                    if calls == count and not after:
                        os.kill(os.getpid(), signal.SIGKILL)
                    real(*arguments)
                    if calls == count:
                        os.kill(os.getpid(), signal.SIGKILL)

                return call

            files.os.rename, files.os.replace = dying(rename), dying(replace)  # pyright: ignore
            lrc("cast", run, "--dtype", "bfloat16")

        if forked(work) == 0:
            break
        assert chain(run) in (["factorize"], ["factorize", "cast"])
        cast(run)
        assert chain(run) == ["factorize", "cast"]
        assert contents(run / "cast") == contents(whole / "cast")
        assert not list(run.rglob(".*lrc-*"))
        shutil.rmtree(run / "cast")
        done("factorize", run)  # the chain is kept, and its last link is gone
        assert f"{run / 'cast'} is not finished" in refused("show", run)
    assert count >= 5


def test_a_full_disk_leaves_nothing(finished: Finished, monkeypatch: pytest.MonkeyPatch):
    run = finished("svd")
    before = contents(run)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lowrank_compress.stages.rewrite.write_companions", full)
    assert "disk is full" in refused("cast", run, "--dtype", "bfloat16")
    assert contents(run) | {".lock": ""} == before | {".lock": ""}
    assert chain(run) == ["factorize"]


def test_a_value_beyond_the_dtype_is_refused(tiny: Tiny, tmp_path: Path):
    model = tmp_path / "model"
    shutil.copytree(tiny.model, model)
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"][3] = 1e5
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    run = tmp_path / "run"
    done("compress", model, *tiny.options(run, "svd")[1:])
    message = refused("cast", run, "--dtype", "float16")
    assert "model.norm.weight has the value 100000, beyond 65504" in message
    assert "--dtype bfloat16" in message
    assert not (run / "cast").exists()
    cast(run)


def test_a_checkpoint_that_is_no_run(tiny: Tiny, finished: Finished, tmp_path: Path):
    run, out = finished("svd"), tmp_path / "out"
    plain = tmp_path / "plain"
    shutil.copytree(run / "model", plain)
    assert "is no run, so that the place of the result must be named" in refused("cast", plain, "--dtype", "bfloat16")
    said = cast(plain, "bfloat16", "--out", out)
    assert said["model"] == str(out)
    cast(run)
    for name, digest in contents(run / "cast").items():
        assert contents(out)[name] == digest or name == "manifest.json"
    before = times(out)
    cast(plain, "bfloat16", "--out", out)
    assert times(out) == before
    assert "config.dtype is" in refused("cast", plain, "--dtype", "float16", "--out", out)
    cast(run, "float16", "--out", out, "--overwrite")  # of a run, its final checkpoint
    assert chain(run) == ["factorize", "cast"]
    assert json.loads((out / "config.json").read_text())["dtype"] == "float16"
    done("eval", out, "--perplexity", tiny.heldout)


def test_a_checkpoint_that_transformers_saved(finished: Finished, tmp_path: Path):
    saved = tmp_path / "saved"
    model = AutoModelForCausalLM.from_pretrained(finished("auto") / "model")
    model.save_pretrained(saved)
    cast(saved, "bfloat16", "--out", tmp_path / "out")
    assert not (tmp_path / "out" / "lowrank.json").exists()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_nothing_is_written_over_what_matters(tiny: Tiny, finished: Finished, tmp_path: Path):
    run = finished("svd")
    other = tmp_path / "other"
    shutil.copytree(tiny.model, other)
    (tmp_path / "file").write_text("precious")
    before = contents(run) | contents(other) | contents(tiny.model)
    for out in (other, run, run / "model", run / "model" / "new", run / "scores", tiny.model, tmp_path / "file"):
        assert lrc("cast", run, "--dtype", "bfloat16", "--out", out, "--overwrite").code == 2, out
    assert contents(run) | contents(other) | contents(tiny.model) | {".lock": ""} == before | {".lock": ""}


def test_what_cannot_be_cast_is_refused(tiny: Tiny, finished: Finished, tmp_path: Path):
    assert "is not compressed by this program" in refused(
        "cast", tiny.model, "--dtype", "bfloat16", "--out", tmp_path / "out"
    )
    run = finished("svd")
    assert "'int8'" in refused("cast", run, "--dtype", "int8")
    (run / "run.json").unlink()
    assert "has no run.json" in refused("cast", run, "--dtype", "bfloat16")


def test_several_processes_cast_as_one(finished: Finished, tmp_path: Path):
    run, alone = finished("svd"), tmp_path / "alone"
    shutil.copytree(run, alone)
    assert ended(start(2, "cast", run, "--dtype", "bfloat16", "--json")) == [0, 0]
    cast(alone)
    files = contents(run / "cast")
    assert chain(run) == ["factorize", "cast"]
    assert {name for name, digest in contents(alone / "cast").items() if files[name] != digest} <= {"manifest.json"}
