"""`lrc bench`: its targets, its tables and bars, and what it refuses."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowrank_compress.cli.benchmark import bar
from lowrank_compress.evaluation.size import measure_size
from lowrank_compress.model.checkpoint import Checkpoint
from lowrank_compress.recipe import Recipe
from lowrank_compress.stages.run import recipe_text
from tests.runs import FEW as FEW_SAMPLES
from tests.runs import Tiny, done, lrc, refused
from tests.tiny import save_tiny

ROOT = Path(__file__).parents[2]
FEW = ("--batch-size", "1,2", "--prompt-tokens", "4", "--new-tokens", "2", "--rounds", "2", "--threads", "1")
Finished = Callable[[str], Path]


def test_a_run_against_its_original(pristine: Finished, tiny: Tiny):
    run = pristine("svd")
    found = done("bench", run, *FEW, "--json").json
    assert found["base"] == tiny.model.name
    assert list(found["models"]) == [tiny.model.name, run.name]
    assert found["environment"]["threads"] == 1
    compressed = found["models"][run.name]
    assert compressed["path"] == str(run / "model")
    assert compressed["weights_bytes"] == measure_size(Checkpoint(run / "model")).bytes
    assert compressed["limit"] > 1
    assert [row["batch_size"] for row in found["measurements"]] == [1, 2]
    for row in found["measurements"]:
        for phase in ("prefill", "decode"):
            ratio = row["models"][run.name][phase]["ratio"]
            assert 0 < ratio["min"] <= ratio["median"] <= ratio["max"]
            assert len(row["models"][run.name][phase]["samples"]) == 2


def test_table_and_bars(pristine: Finished, tiny: Tiny):
    said = done("bench", pristine("svd"), pristine("auto"), "--against", tiny.model, *FEW)
    assert "Tokens a second (cpu, 1 thread, sdpa; medians of 2 rounds" in said.out
    assert "Memory (weights and KV cache, computed)" in said.out
    for run in ("svd", "auto"):
        assert f"{run} against {tiny.model.name}" in said.out
    # A line a phase and shape of each run; how long its bar is depends on how fast the machine was just then.
    bars = [line for line in said.out.splitlines() if line.startswith(("prefill ", "decode ")) and "×" in line[20:]]
    assert len(bars) == 8
    assert sum("of the limit" in line for line in bars) == 4
    assert "\x1b" not in said.out
    assert "batch 2 × prompt 4: done (9)" in said.err


def test_a_checkpoint_with_itself_in_eager_float64(tiny: Tiny, tmp_path: Path):
    other = save_tiny("llama", tmp_path / tiny.model.name, intermediate_size=24)
    options = ("--against", tiny.model, "--attention", "eager", "--dtype", "float64")
    found = done("bench", other, *options, *FEW, "--json").json
    assert list(found["models"]) == [tiny.model.name, f"{tmp_path.name}/{tiny.model.name}"]
    assert found["models"][tiny.model.name]["weights_bytes"] == 2 * measure_size(Checkpoint(tiny.model)).bytes


def test_classifiers(tmp_path: Path):
    one, other = (save_tiny("bert", tmp_path / name, "classification") for name in ("one", "other"))
    few = FEW[:4] + FEW[6:]
    said = done("bench", one, "--against", other, *few)
    assert "Classifiers generate nothing: only the forward pass is measured." in said.out
    assert "decode" not in said.out
    message = refused("bench", one, "--against", other, *FEW)
    assert "is a classifier, which generates nothing; leave --new-tokens out" in message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt-tokens", "4,x"], "--prompt-tokens '4,x' is no list of whole numbers from 1 to 1048576"),
        (["--batch-size", "0"], "--batch-size '0' is no list of whole numbers from 1 to 1048576"),
        (["--prompt-tokens", "159"], "159 prompt tokens and 32 new ones are more than the 160 positions"),
        (["--attention", "egaer"], "Unknown attention 'egaer'. Did you mean 'eager'?"),
        (["--dtype", "float8"], "Unknown dtype 'float8'"),
        (["--device", "gpu"], "Unknown device 'gpu'"),
        (["--against", "/no/such"], "The directory /no/such does not exist"),
    ],
)
def test_bad_options(pristine: Finished, options: list[str], message: str):
    assert message in refused("bench", pristine("svd"), *options)


def test_bad_targets(pristine: Finished, tiny: Tiny, tmp_path: Path):
    assert "The directory /no/such does not exist" in refused("bench", "/no/such")
    assert "is no run, so that its original is not known" in refused("bench", tiny.model)
    assert "is to be measured twice" in refused("bench", tiny.model, "--against", tiny.model)
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "recipe.yaml").write_text(recipe_text(Recipe(model="somewhere")))
    assert "the run has no checkpoint yet" in refused("bench", tmp_path / "begun")


@pytest.mark.parametrize(
    ("share", "marks", "drawn"),
    [
        (0.0, (), "        "),
        (0.5, (), "████    "),
        (1.0, (), "████████"),
        (2.0, (), "████████"),
        (0.53, (), "████▎   "),
        (0.5, (1.0, 0.75), "████ ┊ ┊"),
        (0.5, (0.25,), "████    "),
    ],
)
def test_bar(share: float, marks: tuple[float, ...], drawn: str):
    assert bar(share, marks, width=8) == drawn


def test_random_llamas_load_and_compress(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    monkeypatch.delitem(sys.modules, "random_llama", raising=False)
    import random_llama

    shape = random_llama.Shape(32, 2, 72, 4, 2, vocab_size=320)
    model = tmp_path / "random"
    model.mkdir()
    count = random_llama.write(model, shape, "bfloat16", seed=0, shard_bytes=20_000)
    assert len(list(model.glob("model-*.safetensors"))) > 1
    loaded, loading = AutoModelForCausalLM.from_pretrained(model, output_loading_info=True)
    assert not any(loading.values())
    assert count == loaded.num_parameters() == measure_size(Checkpoint(model)).model
    ids = AutoTokenizer.from_pretrained(model)("naïve")["input_ids"]
    assert ids[0] == 1
    assert len(ids) == 1 + len("naïve".encode())
    assert max(ids) < 3 + 256
    run = tmp_path / "run"
    done("compress", model, "--method", "svd", "--calibration", tiny.text, *FEW_SAMPLES, "--out", run)
    assert done("bench", run, *FEW, "--json").json["models"]["run"]["limit"] > 1


def test_the_sizes_of_random_llamas_are_what_they_are_called(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import torch
    from random_llama import SHAPES, make_config

    for name, shape in SHAPES.items():
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(make_config(shape, "bfloat16"))
        billions = float(name.removesuffix("B"))
        assert model.num_parameters() / 1e9 == pytest.approx(billions, rel=0.16)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--batch-size", 10**30),
        ("--batch-size", 10**9),
        ("--prompt-tokens", "9" * 5000),
        ("--new-tokens", 10**40),
        ("--rounds", 10**12),
        ("--seed", 2**64),
        ("--seed", -5),
        ("--threads", 10**9),
    ],
)
def test_numbers_beyond_all_machines_are_refused(tiny: Tiny, option: str, value: object):
    said = lrc("bench", tiny.model, option, value)
    assert said.code == 2
    assert option in said.err
