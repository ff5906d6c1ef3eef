"""`lrc quantize` from end to end: what is stored, who loads it, what it takes, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import lowrank_compress
from lowrank_compress.artifacts.manifest import read_manifest
from lowrank_compress.calibration.layers import layer_moments
from lowrank_compress.evaluation.size import measure_size
from lowrank_compress.linalg.quantease import loss
from lowrank_compress.model.checkpoint import Checkpoint
from lowrank_compress.model.skeleton import Skeleton
from lowrank_compress.model.walk.batch import Batch
from lowrank_compress.shipped.packed import PackedLinear
from lowrank_compress.stages.index import read_index
from tests.runs import FEW, Tiny, contents, cut_after_a_block, done, lrc, refused, results, times
from tests.tiny import save_tiny

Finished = Callable[[str], Path]
IDS = torch.arange(4, 36)[None]


def quantize(target: Path, *more: object) -> dict[str, Any]:
    return done("quantize", target, "--group", 16, "--json", *more).json


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def test_a_dense_checkpoint_becomes_one_of_compressed_tensors(tiny: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "four"
    said = quantize(tiny.model, "--bits", 4, "--calibration", tiny.text, *FEW, "--out", out)["quantize"]
    settings = json.loads((out / "config.json").read_text())
    assert settings["quantization_config"]["quant_method"] == "compressed-tensors"
    assert "auto_map" not in settings
    size = measure_size(Checkpoint(out))
    assert size.blocks == said["weights"] == measure_size(Checkpoint(tiny.model)).blocks
    assert size.block_bytes == said["stored_bytes"] == said["layer_bytes"]
    assert said["bits_per_weight"] == pytest.approx(8 * size.block_bytes / size.blocks)
    assert size.bytes == sum(tensor.nbytes for tensor in load_file(out / "model.safetensors").values())
    assert "compressed-tensors" in done("show", out).out
    done("export", out, "--dense", tmp_path / "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    other = AutoModelForCausalLM.from_pretrained(tiny.model)
    assert 0 < (logits(dense) - logits(other)).norm() < 0.3 * logits(other).norm()
    pytest.importorskip("compressed_tensors")
    stock = AutoModelForCausalLM.from_pretrained(out)
    assert torch.equal(logits(stock), logits(dense))


@pytest.mark.slow
def test_a_run_is_quantized_last_and_everything_follows(tiny: Tiny, finished: Finished, tmp_path: Path) -> None:
    run = finished("modegpt")  # narrower attention and MLPs
    before = results(run)
    said = quantize(run, "--bits", 3, "--asymmetric")
    assert results(run) == before
    assert [link.stage for link in read_index(run / "run.json").chain] == ["factorize", "quantize"]
    out = run / "quantize"
    settings = json.loads((out / "config.json").read_text())["quantization_config"]
    assert (settings["quant_method"], settings["version"]) == ("lowrank", 5)
    report = json.loads((out / "lowrank.json").read_text())
    assert report["stored_bytes"] == measure_size(Checkpoint(out)).block_bytes == said["quantize"]["stored_bytes"]
    assert report["reached_ratio_bytes"] == pytest.approx(1 - report["stored_bytes"] / report["claimed_bytes"])
    size = done("eval", run, "--perplexity", tiny.heldout, "--json").json["size"]
    assert size["block_bytes"]["compressed"] == report["stored_bytes"]
    assert done("verify", run, "--json").json["ok"]
    assert f"take {report['quantize']['bits_per_weight']:.2f} bits each" in (out / "README.md").read_text()
    model = AutoModelForCausalLM.from_pretrained(out)
    assert sum(isinstance(module, PackedLinear) for module in model.modules()) == len(report["quantize"]["layers"])
    require_saved_and_loaded(model, tmp_path)
    done("export", run, "--dense", tmp_path / "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert torch.allclose(logits(dense), logits(model), atol=1e-4)
    assert torch.allclose(logits(model.dequantize()), logits(dense), atol=1e-6)
    for command in (["cast", run / "quantize", "--dtype", "bfloat16"], ["quantize", run / "quantize"]):
        message = refused(*command, "--out", tmp_path / "no", *(["--rounding", "rtn"] * (command[0] == "quantize")))
        assert f"is quantized, which comes last: `lrc {command[0]}` cannot change its weights" in message


REMOTE = """
import sys, torch
sys.modules["lowrank_compress"] = sys.modules["compressed_tensors"] = None
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
with torch.no_grad():
    torch.save(model(torch.arange(4, 36)[None]).logits, sys.argv[2])
"""


def logits_by_remote_code(out: Path, place: Path) -> Tensor:
    """Compute logits where neither this package nor compressed-tensors is."""
    subprocess.run([sys.executable, "-c", REMOTE, out, place / "logits.pt"], check=True, capture_output=True)
    return torch.load(place / "logits.pt")


def require_saved_and_loaded(model: PreTrainedModel, place: Path) -> None:
    """Save a model once more, and demand the same logits."""
    model.save_pretrained(place / "again")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(place / "again")), logits(model))


@pytest.mark.slow
def test_transposed_weights_and_factors_load_by_remote_code_alone(tiny: Tiny, tmp_path: Path) -> None:
    gpt = save_tiny("gpt2", tmp_path / "gpt2")
    run, dense = tmp_path / "run", tmp_path / "dense"
    done("compress", gpt, "--method", "svd", "--ratio", 0.2, "--for", "q=dense", "--out", run)
    quantize(run, "--bits", 5, "--rounding", "rtn", "--symmetric")
    for source in (run / "quantize", tmp_path / "alone"):
        if source.name == "alone":
            quantize(gpt, "--bits", 6, "--rounding", "rtn", "--out", source)
        model = AutoModelForCausalLM.from_pretrained(source)
        kinds = [module for module in model.modules() if isinstance(module, PackedLinear)]
        assert len(kinds) == len(json.loads((source / "lowrank.json").read_text())["quantize"]["layers"]) >= 8
        done("export", source, "--dense", dense, "--overwrite")
        assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained(dense)), logits(model), atol=1e-4)
    assert torch.equal(logits_by_remote_code(source, tmp_path), logits(model))


@pytest.mark.slow
@pytest.mark.parametrize("budget", [("--bits", 4.1), ("--bytes", 0.11)])
def test_a_budget_is_never_exceeded_and_buys_more_than_equal_bits(
    tiny: Tiny, tmp_path: Path, budget: tuple[str, float]
) -> None:
    text = ("--calibration", tiny.text, *FEW)
    said = quantize(tiny.model, *budget, *text, "--out", tmp_path / "mixed")["quantize"]
    equal = quantize(tiny.model, "--bits", 2, *text, "--out", tmp_path / "equal")["quantize"]
    if budget[0] == "--bits":
        assert 3.9 < said["bits_per_weight"] <= 4.1
    else:
        assert 0.1 < said["stored_bytes"] / said["original_bytes"] <= 0.11
    assert said["stored_bytes"] == measure_size(Checkpoint(tmp_path / "mixed")).block_bytes
    assert said["predicted_loss"] < equal["predicted_loss"]
    settings = json.loads((tmp_path / "mixed" / "config.json").read_text())["quantization_config"]
    found = {group["weights"]["num_bits"] for group in settings["config_groups"].values()}
    report = json.loads((tmp_path / "mixed" / "lowrank.json").read_text())
    assert found == {layer["bits"] for layer in report["quantize"]["layers"].values()} - {None}
    assert len(found) > 1
    if budget[0] == "--bits":
        pytest.importorskip("compressed_tensors")
        done("export", tmp_path / "mixed", "--dense", tmp_path / "dense")
        stock, dense = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("mixed", "dense"))
        assert torch.equal(logits(stock), logits(dense))


def test_predicted_losses_are_those_of_the_moments_and_better_roundings_lose_less(tiny: Tiny, tmp_path: Path) -> None:
    losses = {}
    for rounding in ("gptq", "quantease"):
        out = tmp_path / rounding
        quantize(tiny.model, "--bits", 3, "--rounding", rounding, "--calibration", tiny.text, *FEW, "--out", out)
        layers = json.loads((out / "lowrank.json").read_text())["quantize"]["layers"]
        losses[rounding] = sum(layer["loss"] for layer in layers.values())
    assert losses["quantease"] < losses["gptq"]
    assert json.loads((tmp_path / "gptq" / "lowrank.json").read_text())["quantize"]["unit"] == "share"


def test_moments_of_layers_are_those_of_autograd(tiny: Tiny) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny.model, dtype=torch.float64)
    ids = torch.randint(4, 96, (3, 12), generator=torch.Generator().manual_seed(0))
    paths = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.down_proj"]
    names = [f"model.layers.1.{path}" for path in paths]
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for name in names:

        def keep(_: Any, args: Any, out: torch.Tensor, name: str = name) -> None:
            out.retain_grad()
            seen[name] = (args[0], out)

        model.get_submodule(name).register_forward_hook(keep)
    shares = model(ids).logits[:, :-1].log_softmax(-1)
    (-shares.gather(2, ids[:, 1:, None]).sum()).backward()
    skeleton = Skeleton(Checkpoint(tiny.model), torch.device("cpu"), torch.float64)
    layers = [[name.replace("layers.1", f"layers.{block}") for name in names] for block in (0, 1)]
    batches = [Batch(ids[:2], None, None), Batch(ids[2:], None, None)]
    found = dict(layer_moments(skeleton, batches, layers, gradients=True, skip=lambda block: block == 0))
    assert list(found) == [1]
    for name in names:
        x, out = seen[name]
        assert out.grad is not None
        for moment, rows in ((found[1][name].gram, x), (found[1][name].fisher, out.grad)):
            flat = rows.detach().flatten(0, 1)
            assert torch.allclose(moment, flat.mT @ flat / ids.numel(), atol=1e-12)
    forwards = dict(layer_moments(skeleton, batches, layers, gradients=False))
    assert torch.allclose(forwards[1][names[0]].gram, found[1][names[0]].gram)
    assert loss(torch.eye(32).double(), forwards[0][f"model.layers.0.{paths[0]}"].gram) > 0


def test_killed_and_repeated_it_ends_in_the_same_bytes(tiny: Tiny, tmp_path: Path) -> None:
    words = (tiny.model, "--bits", 3, "--calibration", tiny.text, *FEW, "--out")
    quantize(*words, tmp_path / "whole")
    assert cut_after_a_block(lambda: quantize(*words, tmp_path / "cut"))
    assert not (tmp_path / "cut").exists()
    assert len(list((tmp_path / "cut.work").iterdir())) == 1
    quantize(*words, tmp_path / "cut")
    assert not (tmp_path / "cut.work").exists()
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    before = times(tmp_path / "cut")
    quantize(*words, tmp_path / "cut")
    assert times(tmp_path / "cut") == before
    manifest = read_manifest(tmp_path / "cut")
    assert manifest is not None
    assert manifest.key.stage == "quantize"


@pytest.mark.slow
def test_a_residual_is_an_adapter_of_peft_that_makes_up_for_rounding(tiny: Tiny, tmp_path: Path) -> None:
    words = ("--bits", 2, "--residual-rank", 6, "--calibration", tiny.text, *FEW)
    out = tmp_path / "two"
    said = quantize(tiny.model, *words, "--out", out)["quantize"]
    tensors = load_file(out / "adapter" / "adapter_model.safetensors")
    assert said["residual_bytes"] == sum(tensor.nbytes for tensor in tensors.values())
    assert len(tensors) == 2 * len(json.loads((out / "lowrank.json").read_text())["quantize"]["layers"])
    message = refused("quantize", tiny.model, *words, "--asymmetric", "--out", tmp_path / "no")
    assert "A residual becomes an adapter of a stock checkpoint" in message
    peft = pytest.importorskip("peft")
    done("export", out, "--dense", tmp_path / "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    expected, base = logits(AutoModelForCausalLM.from_pretrained(tiny.model)), logits(dense)
    mended = logits(peft.PeftModel.from_pretrained(dense, out / "adapter"))
    assert (mended - expected).norm() < 0.8 * (base - expected).norm()
    pytest.importorskip("compressed_tensors")
    stock = AutoModelForCausalLM.from_pretrained(out)
    assert torch.equal(logits(stock), base)  # its weights are unpacked at the first call
    assert torch.allclose(logits(peft.PeftModel.from_pretrained(stock, out / "adapter")), mended, atol=1e-5)


@pytest.mark.slow
def test_python_makes_the_same_bytes(tiny: Tiny, finished: Finished, tmp_path: Path) -> None:
    run = finished("svd")
    said = lowrank_compress.quantize(tiny.model, 3, rounding="rtn", group=16, out=tmp_path / "python")
    quantize(tiny.model, "--bits", 3, "--rounding", "rtn", "--out", tmp_path / "command")
    assert contents(tmp_path / "python") == contents(tmp_path / "command")
    assert said["quantize"]["stored_bytes"] == measure_size(Checkpoint(tmp_path / "python")).block_bytes
    assert lowrank_compress.quantize(run, 5.5, rounding="rtn", group=8)["model"] == str(run / "quantize")
    with pytest.raises(lowrank_compress.LrcError, match="the place of the result must be named: pass out"):
        lowrank_compress.quantize(tiny.model, rounding="rtn")
    with pytest.raises(lowrank_compress.LrcError, match="The call of quantize: unknown option 'grup'"):
        lowrank_compress.quantize(tiny.model, rounding="rtn", grup=16, out=tmp_path / "no")


def test_what_cannot_be_done_is_said(tiny: Tiny, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "no")
    assert "name one with --calibration, or take --rounding rtn" in refused("quantize", tiny.model, *out)
    assert "Did you mean 'gptq'" in refused("quantize", tiny.model, "--rounding", "gptg", *out)
    long = refused("quantize", tiny.model, "--calibration", tiny.text, "--seq-len", 200, *out)
    assert "--seq-len 200 is more than the 160 positions of the model" in long
    few = ("--rounding", "rtn", *out)
    assert "bits and bytes are one budget" in refused("quantize", tiny.model, "--bits", 4, "--bytes", 0.2, *few)
    assert "bits is 7; expected one of 2, 3, 4, 5, 6, 8" in refused("quantize", tiny.model, "--bits", 7, *few)
    message = refused("quantize", tiny.model, "--bits", 2.1, "--group", 16, *few)
    assert "The budget is out of reach: with 2 bits and scales for groups of 16" in message
    smallest = message.split("The smallest budget is --bits ")[1].split(";")[0]
    done("quantize", tiny.model, "--bits", smallest, "--group", 16, *few)
    share = refused("quantize", tiny.model, "--bytes", 0.01, "--group", 16, *few[:-1], tmp_path / "other")
    smallest = share.split("The smallest budget is --bytes ")[1].split(";")[0]
    done("quantize", tiny.model, "--bytes", smallest, "--group", 16, *few[:-1], tmp_path / "other")
    assert lrc("compress", tmp_path / "no", "--method", "svd").code == 2
