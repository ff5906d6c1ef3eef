"""`lrc quantize` with something beside the codes, from end to end: SVDQuant and LLM.int8()."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lowrank_compress.calibration import layers
from lowrank_compress.calibration.layers import layer_moments
from lowrank_compress.evaluation.size import measure_size
from lowrank_compress.model.checkpoint import Checkpoint
from lowrank_compress.model.skeleton import Skeleton
from lowrank_compress.model.walk.batch import Batch
from lowrank_compress.shipped.packed import PackedLinear
from tests.runs import FEW, Tiny, contents, done, refused
from tests.stages.test_quantize import logits, logits_by_remote_code, quantize, require_saved_and_loaded
from tests.tiny import save_tiny

SVDQUANT = ("--bits", 4, "--smooth", "--residual-rank", 3, "--rounding", "gptq")
INT8 = ("--bits", 8, "--group", 0, "--outliers", 1.5, "--activation-bits", 8, "--rounding", "rtn")


def made(target: Path, out: Path, tiny: Tiny, *options: object) -> dict[str, Any]:
    return quantize(target, *options, "--calibration", tiny.text, *FEW, "--out", out)["quantize"]


def check_sizes(out: Path, said: dict[str, Any]) -> None:
    size = measure_size(Checkpoint(out))
    assert size.block_bytes == said["stored_bytes"] == said["layer_bytes"]
    assert size.bytes == sum(tensor.nbytes for tensor in load_file(out / "model.safetensors").values())
    assert size.blocks == said["weights"]
    assert said["residual_bytes"] == 0
    assert done("verify", out, "--json").json["ok"]


@pytest.mark.slow
def test_svdquant_is_one_checkpoint_that_everything_follows(tiny: Tiny, tmp_path: Path) -> None:
    out, plain = tmp_path / "svdquant", tmp_path / "plain"
    said = made(tiny.model, out, tiny, *SVDQUANT)
    check_sizes(out, said)
    assert not (out / "adapter").exists()
    settings = json.loads((out / "config.json").read_text())["quantization_config"]
    assert (settings["quant_method"], settings["version"]) == ("lowrank", 8)
    entries = settings["factor_quantization"]["linears"].values()
    assert all(entry[:1] + entry[2:] == [4, True, {"rank": 3, "smooth": True}] for entry in entries)
    shown = " ".join(done("show", out).out.split())
    assert "Beside the codes there are scales that shift outliers of activations to weights, and a product" in shown
    assert "a product of rank 3; they count." in " ".join((out / "README.md").read_text().split())
    model = AutoModelForCausalLM.from_pretrained(out)
    require_saved_and_loaded(model, tmp_path)
    assert torch.equal(logits_by_remote_code(out, tmp_path), logits(model))
    done("export", out, "--dense", tmp_path / "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert torch.allclose(logits(dense), logits(model), atol=1e-4)
    other = made(tiny.model, plain, tiny, "--bits", 4, "--rounding", "gptq")
    expected = logits(AutoModelForCausalLM.from_pretrained(tiny.model))
    alone = logits(AutoModelForCausalLM.from_pretrained(plain))
    assert (logits(model) - expected).norm() < (alone - expected).norm()
    assert sum(layer["loss"] for layer in losses(out)) < sum(layer["loss"] for layer in losses(plain))
    assert said["layer_bytes"] > other["layer_bytes"]


def losses(out: Path) -> list[dict[str, Any]]:
    return list(json.loads((out / "lowrank.json").read_text())["quantize"]["layers"].values())


def test_llm_int8_keeps_what_large_inputs_meet(tiny: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "int8"
    said = made(tiny.model, out, tiny, *INT8)
    check_sizes(out, said)
    found = losses(out)
    assert said["beside"]["outlier_columns"] == sum(layer.get("outliers", 0) for layer in found)
    assert 0 < said["beside"]["outlier_columns"] < said["beside"]["columns"]
    assert all(layer["group"] == layer["shape"][1] for layer in found)
    assert "What enters a layer is rounded to 8 bits" in " ".join(done("show", out).out.split())
    tensors, before = load_file(out / "model.safetensors"), load_file(tiny.model / "model.safetensors")
    kept = [name.removesuffix("_outliers") for name in tensors if name.endswith("weight_outliers")]
    assert len(kept) == sum("outliers" in layer for layer in found)
    model = AutoModelForCausalLM.from_pretrained(out)
    stock = AutoModelForCausalLM.from_pretrained(tiny.model)
    peaks: dict[str, torch.Tensor] = {}
    for name in kept:
        columns = tensors[f"{name}_columns"].long()
        assert torch.equal(tensors[f"{name}_outliers"], before[name][:, columns].bfloat16())
        layer = model.get_submodule(name.removesuffix(".weight"))
        assert isinstance(layer, PackedLinear)
        assert (layer.weight - before[name]).abs().max() < 0.02
        peaks[name.removesuffix(".weight")] = columns

    def loud(path: str) -> Any:
        def hook(_: Any, args: Any, __: Any) -> None:
            beyond = (args[0].flatten(0, -2).abs().amax(0) > 1.5).nonzero().flatten()
            assert set(beyond.tolist()) <= set(peaks.get(path, torch.tensor([])).tolist())

        return hook

    # Of the calibration text's first window.
    for layer in json.loads((out / "lowrank.json").read_text())["quantize"]["layers"]:
        stock.get_submodule(layer).register_forward_hook(loud(layer))
    reference = logits(AutoModelForCausalLM.from_pretrained(tiny.model))
    assert (logits(model) - reference).norm() < 0.03 * reference.norm()


@pytest.mark.slow
def test_a_run_and_transposed_weights_take_it_too(tiny: Tiny, tmp_path: Path) -> None:
    gpt, run = save_tiny("gpt2", tmp_path / "gpt2"), tmp_path / "run"
    done("compress", gpt, "--method", "svd", "--ratio", 0.2, "--for", "q=dense", "--out", run)
    options = ("--smooth", "--outliers", 2, "--residual-rank", 2, "--asymmetric", "--rounding", "rtn")
    quantize(run, "--calibration", tiny.text, *FEW, *options)
    assert done("verify", run, "--json").json["ok"]
    made(gpt, tmp_path / "alone", tiny, *options)
    for out in (run / "quantize", tmp_path / "alone"):
        said = json.loads((out / "lowrank.json").read_text())["quantize"]
        assert measure_size(Checkpoint(out)).block_bytes == said["stored_bytes"]
        model = AutoModelForCausalLM.from_pretrained(out)
        done("export", out, "--dense", tmp_path / "dense", "--overwrite")
        dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
        assert torch.allclose(logits(dense), logits(model), atol=1e-4)
        assert torch.allclose(logits(model.dequantize()), logits(dense), atol=1e-5)


@pytest.mark.slow
def test_the_same_twice_is_the_same_bytes(tiny: Tiny, tmp_path: Path) -> None:
    for name in ("one", "two"):
        made(tiny.model, tmp_path / name, tiny, *SVDQUANT, "--activation-bits", 4)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_what_is_seen_of_single_inputs_is_what_enters(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny.model, dtype=torch.float64)
    ids = torch.randint(4, 96, (4, 12), generator=torch.Generator().manual_seed(0))
    path, seen = "model.layers.1.self_attn.v_proj", list[torch.Tensor]()
    model.get_submodule(path).register_forward_hook(lambda module, args, out: seen.append(args[0].detach()))
    mask = torch.ones_like(ids)
    mask[3, 7:] = 0
    model(ids, attention_mask=mask)
    (x,) = seen
    real = x[mask.bool()]
    skeleton = Skeleton(Checkpoint(tiny.model), torch.device("cpu"), torch.float64)
    batches = [Batch(ids[:2], mask[:2]), Batch(ids[2:], mask[2:])]
    leaves = ("q_proj", "v_proj")
    names = [[f"model.layers.{block}.self_attn.{leaf}" for leaf in leaves] for block in (0, 1)]
    monkeypatch.setattr(layers, "ROWS", 8)
    found = dict(layer_moments(skeleton, batches, names, gradients=False, single=True))[1][path].seen
    assert found is not None
    assert torch.allclose(found.peaks, real.abs().amax(0))
    assert found.rows.shape == (10, 32)
    assert all((real - row).abs().sum(1).min() < 1e-9 for row in found.rows)
    assert torch.allclose(found.rows[0], real[0])
    assert torch.allclose(found.rows[-1], real[-1])


def test_what_cannot_be_asked_for_is_said(tiny: Tiny, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "no")
    text = ("--calibration", tiny.text, *FEW)
    for option in (("--smooth",), ("--outliers", 6), ("--activation-bits", 8)):
        message = refused("quantize", tiny.model, "--rounding", "rtn", *option, *out)
        assert "This quantization looks at the model on a text: name one with --calibration" in message
        message = refused("quantize", tiny.model, "--bits", 3.5, *option, *text, *out)
        assert "go with one whole number of bits for all weights" in message
    message = refused("quantize", tiny.model, "--group", 4, *text, *out)
    assert "group is 4; expected 8 columns or more, or 0 for all of a row" in message
    assert "activation_bits" in refused("quantize", tiny.model, "--activation-bits", 9, *text, *out)
    assert "outliers" in refused("quantize", tiny.model, "--outliers", 0, *text, *out)
