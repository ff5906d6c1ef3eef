"""W ≈ Q + A B in one checkpoint: the same matrices as a base and its adapter, counted, and chosen under a budget."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lowrank_compress.evaluation.size import measure_size
from lowrank_compress.model.checkpoint import Checkpoint
from tests.runs import FEW, Tiny, done, refused

IDS = torch.arange(4, 36)[None]


def quantize(target: Path, out: Path, *more: object) -> dict[str, Any]:
    return done("quantize", target, "--group", 16, "--json", "--out", out, *more).json["quantize"]


def dense(checkpoint: Path, place: Path) -> dict[str, torch.Tensor]:
    done("export", checkpoint, "--dense", place)
    return load_file(place / "model.safetensors")


@pytest.mark.slow
def test_it_is_the_base_and_its_adapter(tiny: Tiny, tmp_path: Path) -> None:
    options = ("--bits", 3, "--residual-rank", 2, "--rounding", "gptq", "--calibration", tiny.text, *FEW)
    apart = quantize(tiny.model, tmp_path / "apart", *options)
    said = quantize(tiny.model, tmp_path / "one", *options, "--residual-inside")
    adapter = load_file(tmp_path / "apart/adapter/adapter_model.safetensors")
    base, whole = dense(tmp_path / "apart", tmp_path / "base"), dense(tmp_path / "one", tmp_path / "whole")
    paths = [name.removesuffix(".lora_A.weight") for name in adapter if name.endswith(".lora_A.weight")]
    assert len(paths) == len(said["layers"]) if "layers" in said else len(paths) == 14
    for path in paths:
        product = adapter[f"{path}.lora_B.weight"].double() @ adapter[f"{path}.lora_A.weight"].double()
        name = f"{path.removeprefix('base_model.model.')}.weight"
        assert torch.allclose(whole[name].double(), base[name].double() + product, atol=1e-6)
        assert product.abs().max() > 1e-4
    # Counted, and in the place of the adapter.
    assert said["residual_bytes"] == 0
    assert said["stored_bytes"] == apart["stored_bytes"] + apart["residual_bytes"]
    assert measure_size(Checkpoint(tmp_path / "one")).block_bytes == said["stored_bytes"]
    assert not (tmp_path / "one/adapter").exists()
    with torch.no_grad():
        model, plain = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("one", "whole"))
        assert torch.allclose(model(IDS).logits, plain(IDS).logits, atol=1e-4)


@pytest.mark.slow
def test_under_a_budget_products_are_where_they_pay(tiny: Tiny, tmp_path: Path) -> None:
    options = ("--bytes", 0.15, "--residual-rank", 1, "--residual-inside", "--rounding", "rtn")
    said = quantize(tiny.model, tmp_path / "some", *options)
    layers = json.loads((tmp_path / "some/lowrank.json").read_text())["quantize"]["layers"]
    assert said["stored_bytes"] <= 0.15 * said["original_bytes"]
    assert measure_size(Checkpoint(tmp_path / "some")).block_bytes == said["stored_bytes"]
    assert said["beside"]["products"] == sum("rank" in layer for layer in layers.values())
    without = quantize(tiny.model, tmp_path / "none", "--bytes", 0.15, "--rounding", "rtn")
    plain = json.loads((tmp_path / "none/lowrank.json").read_text())["quantize"]["layers"]
    assert without["stored_bytes"] <= 0.15 * said["original_bytes"]
    lost = [sum(layer.get("loss", 0.0) for layer in each.values()) for each in (layers, plain)]
    assert lost[0] <= lost[1] * (1 + 1e-9)


def test_of_a_run_and_what_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done("compress", tiny.model, "--method", "svd", "--ratio", 0.3, "--out", run)
    quantize(run, tmp_path / "out", "--bits", 4, "--residual-rank", 1, "--residual-inside", "--rounding", "rtn")
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        whole = dense(tmp_path / "out", tmp_path / "dense")
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
        assert torch.allclose(model(IDS).logits, plain(IDS).logits, atol=1e-4)
        assert len(whole)
    message = refused("quantize", run, "--residual-inside", "--rounding", "rtn", "--out", tmp_path / "no")
    assert "expected a residual_rank" in message
    message = refused("quantize", run, "--residual-rank", 1, "--rounding", "rtn", "--out", tmp_path / "no")
    assert "--residual-inside" in message


@pytest.mark.slow
@pytest.mark.parametrize("rank", [2])
def test_compress_chooses_products_too(tiny: Tiny, tmp_path: Path, rank: int) -> None:
    options = ("--bytes", 0.15, "--mix", "quantized", "--residual-rank", rank, "--rounding", "rtn")
    text = ("--calibration", tiny.text, *FEW, "--out", tmp_path / "run")
    said = done("compress", tiny.model, *options, *text, "--json").json
    assert said["stored_bytes"] <= 0.15 * said["claimed_bytes"]
    assert said["quantize"]["beside"]["rank"] == rank
    assert done("verify", tmp_path / "run", "--json").json["ok"]
