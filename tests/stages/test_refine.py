"""Matrices fitted anew: never worse, in the same layout, to the same bytes whatever interrupts it."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lowrank_compress.artifacts import tensors as block_files
from lowrank_compress.artifacts.manifest import read_manifest
from lowrank_compress.calibration import shortcuts
from lowrank_compress.formats.table import FORMATS
from lowrank_compress.stages import pipeline, refine
from lowrank_compress.stages.index import read_index
from tests.runs import FEW, Tiny, contents, done, forked, refused, results
from tests.tiny import MODELS, save_tiny

Finished = Callable[[str], Path]


def chain(run: Path) -> list[tuple[str, str]]:
    """Name the links of a run's chain and their directories, each of which must hold what the link says."""
    found = read_index(run / "run.json").chain
    for link in found:
        manifest = read_manifest(run / link.directory)
        assert manifest is not None
        assert (manifest.id, manifest.key.stage) == (link.id, link.stage)
    return [(link.stage, link.directory) for link in found]


def said(checkpoint: Path) -> dict[str, object]:
    return json.loads((checkpoint / "lowrank.json").read_text())["refine"]


def shapes(checkpoint: Path) -> dict[str, tuple[torch.dtype, torch.Size]]:
    return {name: (t.dtype, t.shape) for name, t in load_file(checkpoint / "model.safetensors").items()}


def check(before: Path, after: Path) -> dict[str, object]:
    """Compare a checkpoint and the refined one: all but values is the same, and these are better or the same."""
    assert shapes(before) == shapes(after)
    settings = [json.loads((path / "config.json").read_text()) for path in (before, after)]
    assert settings[0] == settings[1]
    found = said(after)
    assert found["taken"] == (found["divergence_after"] < found["divergence_before"])  # pyright: ignore
    old, new = (load_file(path / "model.safetensors") for path in (before, after))
    assert found["taken"] == any(not torch.equal(old[name], new[name]) for name in old)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("method", ["svd", "kfac", "modegpt", "auto"])
def test_a_run_is_refined_and_better(tiny: Tiny, finished: Finished, method: str):
    run = finished(method)
    shutil.rmtree(run)
    done("compress", *tiny.options(run, method), "--no-refine")
    done("refine", run, "--samples", 64)
    assert chain(run) == [("factorize", "model"), ("refine", "refine")]
    found = check(run / "model", run / "refine")
    assert found["taken"]
    assert done("show", run, "--json").json["refine"] == found
    assert done("verify", run, "--json").json["ok"]
    assert torch.isfinite(AutoModelForCausalLM.from_pretrained(run / "refine")(torch.arange(4, 12)[None]).logits).all()
    assert not (run / "work").exists()


@pytest.mark.parametrize("storage", [name for name in FORMATS if name != "auto"])
def test_every_storage_is_kept(tiny: Tiny, tmp_path: Path, storage: str):
    done("compress", *tiny.options(tmp_path / "run", "kfac"), "--storage", storage, "--samples", 64, "--refine")
    assert check(tmp_path / "run" / "unrefined", tmp_path / "run" / "model")["taken"]


@pytest.mark.parametrize(
    "name",
    ["llama-biases", "llama-many-keys", "gemma2-lm", "qwen3-lm", "phi3-lm", "gpt2-lm", "gpt_neox-lm", "opt-norm-after"],
)
@pytest.mark.parametrize("method", ["kfac", "modegpt"])
def test_every_kind_of_block_gets_better(tiny: Tiny, tmp_path: Path, name: str, method: str):
    kind, task, overrides = MODELS[name]
    if method == "modegpt" and kind == "qwen3":
        method = "auto"
    model = save_tiny(kind, tmp_path / "model", task, **overrides)
    options = ["--method", method, "--calibration", tiny.text, "--samples", 64, "--seq-len", 32]
    done("compress", model, *options, "--refine", "--ratio", 0.4, "--out", tmp_path / "run")
    assert check(tmp_path / "run" / "unrefined", tmp_path / "run" / "model")["taken"]


def test_what_stands_before_all_errors_stays(tiny: Tiny, tmp_path: Path):
    """Of a checkpoint in which the last matrix alone is compressed: that one is fitted anew, the others are right."""
    run = tmp_path / "run"
    done(
        "compress", *tiny.options(run, "svd"), "--ratio", 0.04, "--for", "*.0.*=dense", "--for", "*.1.*[!n]_proj=dense"
    )
    done("refine", run)
    assert said(run / "refine")["taken"]
    before, after = (load_file(run / name / "model.safetensors") for name in ("model", "refine"))
    own = "layers.1.mlp.down_proj."
    assert any(not torch.equal(before[name], after[name]) for name in before if own in name)
    for name, tensor in before.items():
        if own not in name:
            torch.testing.assert_close(after[name], tensor, rtol=1e-4, atol=1e-4)


def test_compress_leaves_the_refined_checkpoint_where_the_model_is(tiny: Tiny, tmp_path: Path):
    run, direct = tmp_path / "run", tmp_path / "direct"
    said_by = done("compress", *tiny.options(run, "svd"), "--refine", "--json").json
    assert said_by["model"] == str(run / "model")
    assert chain(run) == [("factorize", "unrefined"), ("refine", "model")]
    done("compress", *tiny.options(direct, "svd"))
    assert chain(direct) == [("factorize", "model")]
    assert contents(direct / "model") == contents(run / "unrefined")
    done("refine", direct)
    assert load_equal(direct / "refine", run / "model")
    before = results(run)
    done("compress", *tiny.options(run, "svd"), "--refine")
    assert results(run) == before
    done("cast", run, "--dtype", "bfloat16")
    assert chain(run)[-1] == ("cast", "cast")
    done("compress", *tiny.options(run, "svd"), "--refine")
    assert chain(run)[-1] == ("cast", "cast")
    assert done("verify", run, "--json").json["ok"]


def load_equal(one: Path, other: Path) -> bool:
    return (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


def test_auto_refines_and_named_methods_do_not(tiny: Tiny, tmp_path: Path):
    for method, expected in (("auto", True), ("kfac", None)):
        plan = done("compress", *tiny.options(tmp_path / method, method), "--dry-run", "--json").json
        assert plan["recipe"]["refine"] is expected
    plan = done("compress", *tiny.options(tmp_path / "none"), "--no-refine", "--dry-run", "--json").json
    assert plan["recipe"]["refine"] is False


def test_edited_ranks_are_refined_again(tiny: Tiny, tmp_path: Path):
    run = tmp_path / "run"
    done("compress", *tiny.options(run, "svd"), "--refine")
    path = run / "scores" / "ranks.json"
    ranks = path.read_text()
    edited = ranks.replace('"rank": ', '"rank": 1', 1)
    first = next(part for part in ranks.split('"rank": ')[1:])
    edited = ranks.replace(f'"rank": {first[:2]}', '"rank": 3', 1)
    assert edited != ranks
    path.write_text(edited)
    before = contents(run / "model")
    assert "--overwrite" in refused("factorize", run)
    done("factorize", run, "--overwrite")
    assert chain(run) == [("factorize", "unrefined"), ("refine", "model")]
    assert contents(run / "model") != before
    assert shapes(run / "model") == shapes(run / "unrefined")
    assert done("verify", run, "--json").json["ok"]


@pytest.mark.parametrize("at", range(1, 6))
def test_a_killed_refinement_goes_on_to_the_same_bytes(
    tiny: Tiny, finished: Finished, monkeypatch: pytest.MonkeyPatch, at: int
):
    run = finished("svd")
    expected = run.with_name("expected")
    shutil.copytree(run, expected)
    done("refine", expected)
    count, write = iter(range(1, 100)), block_files.write_atomically

    def dying(*arguments: object, **more: object) -> None:
        write(*arguments, **more)  # pyright: ignore
        if next(count) == at:
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(block_files, "write_atomically", dying)
    status = forked(lambda: done("refine", run))
    monkeypatch.undo()
    assert status == (-signal.SIGKILL if at <= 4 else 0)  # two blocks, twice
    assert (run / "refine").exists() == (at > 4)
    done("refine", run)
    assert contents(run / "refine") == contents(expected / "refine")
    assert not (run / "work").exists()


@pytest.mark.slow
def test_gradients_that_scoring_kept_give_the_same_bytes(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As taken anew; and as those among statistics that were kept."""
    sent: list[bool] = []
    capture = refine.capture

    def told(*given: object, **more: object) -> object:
        sent.append(True)
        return capture(*given, **more)  # pyright: ignore

    monkeypatch.setattr(refine, "capture", told)
    ways = {"kept": (), "statistics": ("--keep-statistics",), "anew": ()}
    for way, more in ways.items():
        if way == "anew":
            monkeypatch.setattr(pipeline, "_keeping", lambda plan, run, bases, calibration: bases)
        done("compress", *tiny.options(tmp_path / way, "auto"), "--samples", 16, *more)
        assert bool(sent) == (way == "anew")
        assert not (tmp_path / way / "work").exists()
    assert load_equal(tmp_path / "kept" / "model", tmp_path / "anew" / "model")
    assert load_equal(tmp_path / "kept" / "model", tmp_path / "statistics" / "model")


@pytest.mark.parametrize(("name", "ends"), [("llama-lm", 2), ("gpt2-lm", 2), ("gpt_neox-lm", 2), ("opt-lm", 1)])
def test_what_is_kept_while_a_block_is_fitted_changes_no_byte(
    tmp_path: Path, tiny: Tiny, monkeypatch: pytest.MonkeyPatch, name: str, ends: int
):
    kind, task, overrides = MODELS[name]
    model = save_tiny(kind, tmp_path / "model", task, **overrides)
    options = [model, "--method", "kfac", "--calibration", tiny.text, "--samples", 16, "--seq-len", 32, "--refine"]
    taken: set[str] = set()
    only = shortcuts._only

    def told(matrix: torch.nn.Module, x: torch.Tensor, outputs: int | None) -> Callable[..., object]:
        forward = only(matrix, x, outputs)

        def run(*given: object, **more: object) -> object:
            taken.add(f"{tuple(x.shape[-1:])} {outputs}")
            return forward(*given, **more)

        return run

    monkeypatch.setattr(shortcuts, "_only", told)
    done("compress", *options, "--ratio", 0.4, "--out", tmp_path / "kept")
    assert len(taken) == ends
    monkeypatch.setattr(refine, "kept_bytes", lambda *_: 1 << 60)
    taken.clear()
    done("compress", *options, "--ratio", 0.4, "--out", tmp_path / "again")
    assert not taken
    assert load_equal(tmp_path / "kept" / "model", tmp_path / "again" / "model")


def test_weights_that_do_not_get_better_stay(tiny: Tiny, finished: Finished, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lowrank_compress.stages.refine.divergences", lambda *_: [1.0, 1.0])
    run = finished("svd")
    told = done("refine", run)
    assert "keeps its weights" in told.text
    assert load_equal(run / "model", run / "refine")
    assert said(run / "refine")["taken"] is False
    assert done("verify", run, "--json").json["ok"]


def test_a_checkpoint_elsewhere_needs_its_original(tiny: Tiny, finished: Finished, tmp_path: Path):
    run = finished("svd")
    moved = tmp_path / "moved"
    shutil.copytree(run / "model", moved)
    assert "pass --dense" in refused("refine", moved, "--out", tmp_path / "out")
    assert "leave --dense out" in refused("refine", run, "--dense", tiny.model)
    options = ["--calibration", tiny.text, *FEW, "--out", tmp_path / "out"]
    assert "nothing to refine" in refused("refine", tiny.model, "--dense", tiny.model, *options)
    done("refine", moved, "--dense", tiny.model, *options)
    check(moved, tmp_path / "out")
    assert not (tmp_path / "out.work").exists()
    done("refine", run)
    assert load_equal(run / "refine", tmp_path / "out")
    other = save_tiny("llama", tmp_path / "other", intermediate_size=80)
    assert "was not made from" in refused("refine", moved, "--dense", other, *options, "--overwrite")


def test_another_text_is_another_result(tiny: Tiny, finished: Finished):
    run = finished("svd")
    done("refine", run)
    assert "--overwrite" in refused("refine", run, "--samples", 4)
    done("refine", run, "--samples", 4, "--overwrite")
    assert chain(run) == [("factorize", "model"), ("refine", "refine")]


def test_a_single_window_keeps_everything(finished: Finished):
    run = finished("svd")
    done("refine", run, "--samples", 1)
    assert set(said(run / "refine")["lambdas"].values()) == {"keep"}  # pyright: ignore
    assert load_equal(run / "model", run / "refine")
