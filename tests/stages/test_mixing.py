"""`lrc compress --bytes`: what is stored, what competes, who loads it, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lowrank_compress.artifacts.manifest import read_manifest
from lowrank_compress.evaluation.size import measure_size
from lowrank_compress.model.checkpoint import Checkpoint
from lowrank_compress.stages.choice import FAR
from lowrank_compress.stages.index import read_index
from tests.moe import save_moe
from tests.runs import FEW, Tiny, contents, done, refused, times

IDS = torch.arange(4, 36)[None]
SHARE = 0.12


def mixed(tiny: Tiny, run: Path, *more: object, share: float = SHARE) -> dict[str, Any]:
    text = ("--calibration", tiny.text, *FEW, "--rounding", "rtn")
    return done("compress", tiny.model, "--bytes", share, *text, "--out", run, "--json", *more).json


@pytest.fixture(scope="module")
def run(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("mixed") / "run"
    mixed(tiny, place)
    return place


def logits(path: Path) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(path)(IDS).logits


@pytest.mark.slow
def test_the_budget_holds_and_everything_follows(tiny: Tiny, run: Path, tmp_path: Path) -> None:
    chain = [(link.stage, link.directory) for link in read_index(run / "run.json").chain]
    assert chain == [("factorize", "unquantized"), ("quantize", "model")]
    report = json.loads((run / "model/lowrank.json").read_text())
    size = measure_size(Checkpoint(run / "model"))
    assert size.block_bytes == report["stored_bytes"] <= math.floor(SHARE * report["claimed_bytes"])
    # Little is left over: no more than another bit of the smallest matrix would take.
    assert size.block_bytes > 0.97 * SHARE * report["claimed_bytes"]
    assert done("verify", run, "--json").json["ok"]
    assert "weights in" in done("show", run).out
    found = done("eval", run, "--perplexity", tiny.heldout, "--json").json["size"]
    assert found["block_bytes"]["compressed"] == size.block_bytes
    done("report", run, "--out", tmp_path / "page.html")
    done("export", run, "--dense", tmp_path / "dense")
    assert torch.allclose(logits(run / "model"), logits(tmp_path / "dense"), atol=1e-4)
    before = times(run / "model")
    mixed(tiny, run)
    assert times(run / "model") == before
    assert not list((run / "work").rglob("*.safetensors"))


def test_the_best_plan_on_heldout_text_is_taken(run: Path) -> None:
    manifest = read_manifest(run / "scores")
    assert manifest is not None
    totals = {plan["plan"]: plan["divergence"] + FAR * plan["at_random"] for plan in manifest.report["plans"]}
    assert {"low-rank", "quantized"} <= totals.keys()
    assert manifest.report["plan"] == min(totals, key=totals.__getitem__)


@pytest.mark.slow
def test_a_kind_of_plan_alone_is_taken_without_a_trial(tiny: Tiny, tmp_path: Path) -> None:
    mixed(tiny, tmp_path / "run", "--mix", "quantized")
    settings = json.loads((tmp_path / "run/model/config.json").read_text())
    # The same tensors as of the dense checkpoint, and the same stock format.
    assert settings["quantization_config"]["quant_method"] == "compressed-tensors"
    done("quantize", tiny.model, "--bytes", SHARE, "--rounding", "rtn", "--out", tmp_path / "alone")
    files = [contents(place)["model.safetensors"] for place in (tmp_path / "run/model", tmp_path / "alone")]
    assert files[0] == files[1]
    # Less than two bits for each weight that there was: some must go.
    said = mixed(tiny, tmp_path / "ranks", "--mix", "low-rank", share=0.06)
    assert said["stored_bytes"] <= 0.06 * said["claimed_bytes"]
    assert said["reached_ratio"] > 0
    ranks = json.loads((tmp_path / "ranks/scores/ranks.json").read_text())["matrices"]
    assert {entry["format"] for entry in ranks.values()} & {"pair", "pivot", "width"}


@pytest.mark.slow
def test_a_share_out_of_reach_names_the_smallest(tiny: Tiny, tmp_path: Path) -> None:
    text = ("--calibration", tiny.text, *FEW, "--rounding", "rtn", "--mix", "quantized", "--out", tmp_path / "run")
    message = refused("compress", tiny.model, "--bytes", 0.01, *text)
    assert "--bytes 0.01 is out of reach" in message
    smallest = float(message.rstrip().rstrip(".").rsplit(" ", 1)[1])
    assert 0.05 < smallest < 0.12
    assert "out of reach" in refused("compress", tiny.model, "--bytes", smallest - 1e-3, *text)
    done("compress", tiny.model, "--bytes", smallest, *text)


def test_a_dry_run_says_the_bytes(tiny: Tiny, tmp_path: Path) -> None:
    options = (tiny.model, "--bytes", SHARE, "--calibration", tiny.text, *FEW, "--out", tmp_path / "run", "--dry-run")
    found = done("compress", *options, "--json").json
    size = measure_size(Checkpoint(tiny.model)).block_bytes
    assert found["bytes"] == {"share": SHARE, "original": size, "largest_stored": math.floor(SHARE * size)}
    assert found["disk"]["candidates"] > size
    said = " ".join(done("compress", *options).out.split())
    assert "Store all weights inside the blocks in 12.0% of" in said
    assert "Nothing was written." in said
    assert not (tmp_path / "run").exists()


def test_what_does_not_go_with_it(tiny: Tiny, tmp_path: Path) -> None:
    def message(*options: object) -> str:
        return refused("compress", tiny.model, "--calibration", tiny.text, *FEW, *options, "--out", tmp_path / "no")

    assert "--mix says how weights are stored under a budget in bytes" in message("--mix", "auto")
    assert "are two budgets" in message("--bytes", 0.2, "--ratio", 0.2)
    assert "--kv-ratio does not go with --bytes" in message("--bytes", 0.2, "--kv-ratio", 0.2)
    assert "--second and --refine do not go with --bytes" in message("--bytes", 0.2, "--refine")
    assert "predicted losses in nats" in message("--bytes", 0.2, "--method", "svd-llm")
    assert "leave --ratio-of out" in message("--bytes", 0.2, "--ratio-of", "model")
    assert "Unknown rounding" in message("--bytes", 0.2, "--rounding", "no")
    mixture = save_moe("qwen2_moe", tmp_path / "moe")
    text = ("--calibration", tiny.text, *FEW, "--bytes", 0.2, "--experts", "reap", "--out", tmp_path / "no")
    assert "predicted losses in nats" in refused("compress", mixture, *text)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_experts_are_part_of_the_budget(tiny: Tiny, tmp_path: Path, family: str) -> None:
    run, share = tmp_path / "run", 0.13
    options = ("--calibration", tiny.text, *FEW, "--rounding", "gptq", "--out", run, "--json")
    said = done("compress", save_moe(family, tmp_path / family), "--bytes", share, *options).json
    report = json.loads((run / "model/lowrank.json").read_text())
    size = measure_size(Checkpoint(run / "model"))
    assert size.block_bytes == report["stored_bytes"] == said["stored_bytes"]
    assert 0.97 * share * report["claimed_bytes"] < size.block_bytes <= share * report["claimed_bytes"]
    manifest = read_manifest(run / "scores")
    assert manifest is not None
    totals = {plan["plan"]: plan["divergence"] + FAR * plan["at_random"] for plan in manifest.report["plans"]}
    assert {"low-rank", "quantized", "mixed"} <= totals.keys()
    assert manifest.report["plan"] == min(totals, key=totals.__getitem__)
    packed = {name: layer["bits"] for name, layer in report["quantize"]["layers"].items() if ".experts." in name}
    assert packed
    assert done("verify", run, "--json").json["ok"]
    assert torch.isfinite(logits(run / "model")).all()
