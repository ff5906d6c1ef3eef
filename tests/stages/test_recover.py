"""Short training of a compressed checkpoint: never worse, the same bytes after a crash, what is frozen stays."""

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

from lowrank_compress.artifacts.tensors import BlockFiles
from lowrank_compress.stages.index import read_index
from lowrank_compress.stages.run import Run, work_of
from tests.runs import FEW, Tiny, contents, done, forked, lrc, refused
from tests.stages.test_workers import ended, start
from tests.tiny import save_tiny, tiny_text

Finished = Callable[[str], Path]
SHORT = ("--steps", 30, "--batch", 4)


def recovered(run: Path, *more: object) -> dict[str, dict]:
    return done("recover", run, "--json", *SHORT, *more).json


def tensors(run: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(run / name / "model.safetensors")


@pytest.mark.parametrize("method", ["auto", "svd"])
def test_it_is_better_and_the_final_checkpoint(tiny: Tiny, finished: Finished, tmp_path: Path, method: str):
    run = finished(method)
    said = recovered(run)
    assert said["recover"]["loss_after"] < said["recover"]["loss_before"]
    assert read_index(run / "run.json").chain[-1].stage == "recover"
    before, after = tensors(run, "model"), tensors(run, "recover")
    assert {name: tensor.shape for name, tensor in before.items()} == {name: t.shape for name, t in after.items()}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(before[name], after[name])
    for name in ("model.norm.weight", "model.layers.0.input_layernorm.weight"):
        assert not torch.equal(before[name], after[name])
    assert json.loads((run / "recover/config.json").read_text()) == json.loads((run / "model/config.json").read_text())
    done("eval", run, "--perplexity", tiny.heldout)
    done("verify", run)
    done("export", run, "--dense", tmp_path / "dense")
    done("cast", run, "--dtype", "bfloat16")
    model = AutoModelForCausalLM.from_pretrained(run / "cast")
    assert torch.isfinite(model(torch.arange(4, 12)[None]).logits).all()
    times = (run / "recover/model.safetensors").stat().st_mtime_ns
    recovered(run)  # nothing is done again
    assert (run / "recover/model.safetensors").stat().st_mtime_ns == times


@pytest.mark.parametrize("how", [("--lr", 1e3), ("--lr", 1e-12), ("--steps", 1, "--lr", 30)], ids=str)
def test_what_is_no_better_is_not_taken(finished: Finished, how: tuple[object, ...]):
    run = finished("svd")
    said = done("recover", run, "--json", *SHORT, *how)
    found = said.json["recover"]
    assert found["loss_after"] <= found["loss_before"]
    if found["loss_after"] == found["loss_before"]:
        assert "found nothing that is better" in said.text
        assert tensors(run, "model").keys() == tensors(run, "recover").keys()
        for name, tensor in tensors(run, "model").items():
            assert torch.equal(tensor, tensors(run, "recover")[name])


def test_low_rank_alone_leaves_all_else(finished: Finished):
    run = finished("auto")
    recovered(run, "--train", "low-rank", "--lr", 3e-3)
    before, after = tensors(run, "model"), tensors(run, "recover")
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed
    assert all(name.rpartition(".lr_")[1] for name in changed)


def test_adapters_are_merged_at_the_same_rank(finished: Finished, tmp_path: Path):
    pytest.importorskip("peft")
    run, other = finished("svd"), tmp_path / "other"
    shutil.copytree(run, other)
    for place in (run, other):
        found = recovered(place, "--lora", 2, "--lr", 1e-2)["recover"]
        assert found["loss_after"] < found["loss_before"]
    assert contents(run / "recover") == contents(other / "recover")
    before, after = tensors(run, "model"), tensors(run, "recover")
    assert {name: tensor.shape for name, tensor in before.items()} == {name: t.shape for name, t in after.items()}
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed
    assert all(name.rpartition(".lr_")[1] for name in changed)


def test_killed_it_comes_to_the_same_bytes(finished: Finished, tmp_path: Path):
    run, whole = finished("auto"), tmp_path / "whole"
    shutil.copytree(run, whole)
    long = ("--steps", 60, "--batch", 2, "--lr", 1e-3)
    done("recover", whole, *long)
    save = BlockFiles.write

    def dying(files: BlockFiles, *arguments: object) -> None:
        save(files, *arguments)  # pyright: ignore
        os.kill(os.getpid(), signal.SIGKILL)

    def work() -> None:
        BlockFiles.write = dying  # pyright: ignore
        lrc("recover", run, *long)

    for _ in range(2):
        assert forked(work) == -signal.SIGKILL
        assert list((run / "work").glob("recover-*"))
        assert not (run / "recover").exists()
    done("recover", run, *long)
    assert contents(run / "recover") == contents(whole / "recover")
    assert not (run / "work").exists()


def test_several_processes_train_as_one(finished: Finished, tmp_path: Path):
    run, alone = finished("svd"), tmp_path / "alone"
    shutil.copytree(run, alone)
    few = ("--steps", 5, "--batch", 4, "--lr", 1e-3, "--seq-len", 256, "--json")
    short = tuple("128" if word == "256" else word for word in few)
    done("recover", alone, *short)
    assert ended(start(2, "recover", run, *map(str, short))) == [0, 0]
    one, two = tensors(alone, "recover"), tensors(run, "recover")
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=1e-4, msg=name)


@pytest.mark.slow
def test_text_of_ones_own_needs_no_dense_model(tiny: Tiny, finished: Finished, tmp_path: Path):
    run, plain, out = finished("svd"), tmp_path / "plain", tmp_path / "out"
    shutil.copytree(run / "model", plain)
    assert "must be named" in refused("recover", plain, "--text", tiny.text)
    said = recovered(plain, "--text", tiny.text, "--seq-len", 32, "--out", out)
    assert said["recover"]["towards"] == "text"
    assert said["recover"]["loss_after"] < said["recover"]["loss_before"]
    message = refused("recover", plain, "--calibration", tiny.text, "--seq-len", 32, "--out", tmp_path / "other")
    assert "name the dense model with --dense" in message
    taught = recovered(
        plain, "--calibration", tiny.text, "--seq-len", 32, "--dense", tiny.model, "--out", tmp_path / "taught"
    )
    assert taught["recover"]["towards"] == "dense"


def test_what_cannot_be_trained_is_refused(tiny: Tiny, finished: Finished, tmp_path: Path):
    run = finished("svd")
    assert "one of them" in refused("recover", run, "--steps", 3, "--seconds", 3)
    assert "not compressed" in refused(
        "recover", tiny.model, "--text", tiny.text, "--seq-len", 32, "--out", tmp_path / "out"
    )
    assert "pass one of them" in refused("recover", run, "--text", tiny.text, "--calibration", tiny.text)
    (tmp_path / "short.txt").write_text("the old dog. " * 20)
    assert "training needs 8 at least" in refused("recover", run, "--calibration", tmp_path / "short.txt")


@pytest.mark.parametrize("case", ["gpt2", "phi3", "qwen2", "bert"])
def test_every_kind_of_model(case: str, tmp_path: Path):
    task = "classification" if case == "bert" else "lm"
    dtype = torch.bfloat16 if case == "qwen2" else torch.float32
    model = save_tiny(case, tmp_path / "model", task, dtype=dtype)
    (tmp_path / "text.txt").write_text(tiny_text(6000))
    (tmp_path / "table.tsv").write_text(
        "text\tlabel\n"
        + "".join(f"{tiny_text(20 + n % 3, seed=n).split('.')[0].strip()}\tLABEL_{n % 3}\n" for n in range(40))
    )
    text = ["--calibration", tmp_path / "text.txt"]
    if task == "classification":
        text = ["--calibration", tmp_path / "table.tsv", "--text-column", "text", "--label-column", "label"]
    run = tmp_path / "run"
    done("compress", model, "--method", "modegpt" if task == "lm" else "fwsvd", *text, *FEW, "--out", run)
    found = done("recover", run, "--steps", 8, "--lr", 1e-3, "--json").json["recover"]
    assert found["loss_after"] < found["loss_before"]
    before, after = tensors(run, "model"), tensors(run, "recover")
    assert {name: (t.shape, t.dtype) for name, t in before.items()} == {n: (t.shape, t.dtype) for n, t in after.items()}
    done("verify", run)
    done("export", run, "--dense", tmp_path / "dense")


@pytest.mark.slow
def test_blocks_by_themselves(finished: Finished, tmp_path: Path):
    run, whole, both = finished("svd"), tmp_path / "whole", tmp_path / "both"
    shutil.copytree(run, whole)
    shutil.copytree(run, both)
    alone = ("--block", "--block-steps", 10, "--steps", 0)
    found = done("recover", whole, *alone, "--json").json["recover"]["blocks"]
    assert found["loss_after"] < found["loss_before"]
    changed = {
        name for name, t in tensors(whole, "model").items() if not torch.equal(t, tensors(whole, "recover")[name])
    }
    assert changed
    assert all(name.startswith("model.layers.") for name in changed)
    save = BlockFiles.write

    def dying(files: BlockFiles, *arguments: object) -> None:
        save(files, *arguments)  # pyright: ignore
        os.kill(os.getpid(), signal.SIGKILL)

    def work() -> None:
        BlockFiles.write = dying  # pyright: ignore
        lrc("recover", run, *alone)

    assert forked(work) == -signal.SIGKILL
    done("recover", run, *alone)
    assert contents(run / "recover") == contents(whole / "recover")
    assert not (run / "work").exists()
    then = done("recover", both, *alone[:-1], 10, "--lr", 1e-3, "--json").json["recover"]
    assert then["loss_before"] == pytest.approx(found["loss_after"], rel=1e-4)
    assert then["loss_after"] < then["loss_before"]


def test_no_step_at_all_is_refused(finished: Finished):
    assert "expected one step at least" in refused("recover", finished("svd"), "--steps", 0)


def test_the_state_meanwhile_is_in_the_run_or_beside_the_checkpoint(finished: Finished, tmp_path: Path):
    run = finished("svd")
    assert work_of(run / "recover") == Run(run).work
    assert work_of(tmp_path / "out") == tmp_path / "out.work"
