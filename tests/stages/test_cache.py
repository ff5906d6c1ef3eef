"""`lrc cache`: a smaller key-value cache for what is compressed already."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from lowrank_compress.config import CalibrationSet
from lowrank_compress.evaluation.size import measure_size
from lowrank_compress.linalg.weighted import factors
from lowrank_compress.methods.joint import joint
from lowrank_compress.methods.latent import LatentGroup
from lowrank_compress.methods.linear import Damping
from lowrank_compress.model.checkpoint import Checkpoint
from lowrank_compress.stages.samples import calibration_batches
from tests.runs import FEW, Tiny, done, lrc, refused, results, times
from tests.tiny import save_tiny

IDS = torch.arange(4, 44).view(2, 20)
CACHED = 64  # numbers of a token in the tiny llama's cache: 2 blocks, 2 key-value heads of 8
KINDS = {
    "pair": ("--method", "svd-llm", "--ratio", 0.6),
    "pivot": ("--method", "kfac", "--storage", "pivot", "--ratio", 0.4),
    "narrow": ("--method", "modegpt", "--ratio", 0.2),
    "mlp": ("--method", "svd-llm", "--attention", "dense", "--ratio", 0.2),
}


@pytest.fixture(scope="module")
def runs(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("runs")
    for name, more in KINDS.items():
        done("compress", tiny.model, *more, "--calibration", tiny.text, *FEW, "--out", place / name)
    return {name: place / name for name in KINDS}


def loaded(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path)


@torch.no_grad()
def logits(path: Path) -> Tensor:
    return loaded(path)(IDS).logits


def report(path: Path) -> dict[str, Any]:
    return json.loads((path / "lowrank.json").read_text())


def cached_before(run: Path) -> int:
    return measure_size(Checkpoint(run / "model")).kv_bytes_per_token // 4


@pytest.mark.slow
@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_what_it_makes(runs: dict[str, Path], tiny: Tiny, tmp_path: Path, kind: str, window: int) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs[kind], run)
    before = report(run / "model")
    # Half of what the cache keeps now, which narrower heads have made smaller.
    most = cached_before(run) // 2
    said = done("cache", run, "--kv-ratio", 1 - most / CACHED, "--kv-window", window, "--json").json
    found, path = report(run / "cache"), run / "cache"
    assert said["cache"] == found["cache"]
    assert found["cache"]["window"] == window
    assert found["cache"]["dense"] == CACHED
    assert 0 < found["cache"]["kept"] <= most
    size = measure_size(Checkpoint(path))
    assert size.kv_bytes_per_token == 4 * found["cache"]["kept"]
    # All that is stored is counted, and the sum over the entries is the same.
    assert (found["stored_elements"], found["stored_bytes"]) == (size.blocks, size.block_bytes)
    assert found["claimed_elements"] == before["claimed_elements"]
    gone = sum(entry["dense"] - entry["stored"] for entry in found["matrices"].values())
    assert found["stored_elements"] == found["claimed_elements"] - gone
    assert found["reached_ratio"] == pytest.approx(1 - found["stored_elements"] / found["claimed_elements"])
    kept = {name for name in before["matrices"] if window or not name.endswith(("k_proj", "v_proj"))}
    assert {name for name in found["matrices"] if not name.endswith(":key-value")} == kept
    # With a cache and without one it generates the same.
    model, options = loaded(path), {"max_new_tokens": 8, "do_sample": False}
    expected = model.generate(IDS, **options, use_cache=False)
    for more in ({}, {"cache_implementation": "static"}, {"num_beams": 1}):
        assert model.generate(IDS, **options, **more).equal(expected)
    done("verify", run)
    assert "numbers a token became" in done("show", run).out
    done("cast", run, "--dtype", "bfloat16")
    halved = report(run / "cast")
    assert halved["stored_bytes"] == measure_size(Checkpoint(run / "cast")).block_bytes
    if window == 0:
        done("report", run, "--out", tmp_path / "page.html")
        done("eval", run, "--perplexity", tiny.heldout, "--seq-len", 64)
        done("export", path, "--dense", tmp_path / "dense")
        torch.testing.assert_close(logits(path), logits(tmp_path / "dense"), rtol=0, atol=3e-5)


def test_keys_and_values_are_the_products(runs: dict[str, Path], tmp_path: Path) -> None:
    """Narrower heads keep some rows of keys, in an order of their own, and the first rows of values."""
    run = tmp_path / "run"
    shutil.copytree(runs["narrow"], run)
    done("export", run, "--dense", tmp_path / "before")
    done("cache", run, "--kv-ratio", 1 - (cached_before(run) // 2) / CACHED)
    tensors, model = load_file(run / "cache/model.safetensors"), loaded(tmp_path / "before")
    layout = json.loads((run / "cache/config.json").read_text())["quantization_config"]
    assert layout["version"] == 10
    for path, entry in layout["attention"].items():
        product = tensors[f"{path}.lr_rebuild.weight"].double() @ tensors[f"{path}.lr_latent.weight"].double()
        keys, values = product.split([2 * entry["query_key"], 2 * entry["value"]])
        attention = model.get_submodule(path)
        attention.k_proj.weight.data.zero_()
        attention.v_proj.weight.data.zero_()
        places = tensors.get(f"{path}.lr_rotary", torch.arange(entry["query_key"]).repeat(2, 1))
        for head in range(2):
            for number, place in enumerate(places[head].tolist()):
                attention.k_proj.weight.data[8 * head + place] = keys[head * entry["query_key"] + number]
            for number in range(entry["value"]):
                attention.v_proj.weight.data[8 * head + number] = values[head * entry["value"] + number]
    with torch.no_grad():
        torch.testing.assert_close(logits(run / "cache"), model(IDS).logits, rtol=0, atol=3e-5)


def test_factored_keys_and_values_have_their_latent_already(runs: dict[str, Path], tmp_path: Path) -> None:
    ranks = [
        entry["rank"]
        for name, entry in report(runs["pair"] / "model")["matrices"].items()
        if name.endswith(("k_proj", "v_proj"))
    ]
    assert None not in ranks
    most = sum(ranks)
    assert most < CACHED
    done("cache", runs["pair"] / "model", "--kv-ratio", 1 - most / CACHED, *data(runs), "--out", tmp_path / "new")
    found = report(tmp_path / "new")
    assert found["cache"]["kept"] == most
    assert sum(entry["predicted_loss"] for name, entry in found["matrices"].items() if ":key" in name) < 1e-9
    torch.testing.assert_close(logits(tmp_path / "new"), logits(runs["pair"] / "model"), rtol=0, atol=3e-5)


def data(runs: dict[str, Path]) -> tuple[object, ...]:
    recipe = (runs["pair"] / "recipe.yaml").read_text()
    text = next(line.split(": ", 1)[1] for line in recipe.splitlines() if line.startswith("calibration:"))
    return ("--calibration", text.strip("'\""), *FEW)


def test_the_metric_is_that_of_the_compressed_model(runs: dict[str, Path], tiny: Tiny, tmp_path: Path) -> None:
    """Moments that autograd finds in the whole model, and the same factors from them."""
    text = ("--calibration", tiny.text, "--samples", 32, "--seq-len", 32)
    done("cache", runs["mlp"] / "model", "--kv-ratio", 0.5, *text, "--out", tmp_path / "new")
    model, place = loaded(runs["mlp"] / "model").double(), runs["mlp"] / "model"
    config = CalibrationSet(source=str(tiny.text), samples=32, seq_len=32, micro_batch=4)
    batches = calibration_batches(config, Checkpoint(place), "lm")
    sums: dict[str, Tensor] = {}

    def watch(name: str) -> Any:
        def after(_: Any, args: Any, out: Tensor) -> None:
            x = args[0].detach().flatten(0, 1)
            sums[f"{name}/x"] = sums.get(f"{name}/x", 0) + x.T @ x

            def gradient(g: Tensor) -> None:
                g = g.flatten(0, 1)
                sums[f"{name}/g"] = sums.get(f"{name}/g", 0) + g.T @ g

            out.register_hook(gradient)

        return after

    for layer in range(2):
        for role in "kv":
            name = f"model.layers.{layer}.self_attn.{role}_proj"
            model.get_submodule(name).register_forward_hook(watch(name))
    tokens = 0
    for batch in batches:
        tokens += batch.tokens
        out = model(batch.ids).logits[:, :-1]
        torch.nn.functional.cross_entropy(out.flatten(0, 1), batch.ids[:, 1:].flatten(), reduction="sum").backward()
    tensors = load_file(tmp_path / "new/model.safetensors")
    assert tokens == 1024
    for layer in range(2):
        path = f"model.layers.{layer}.self_attn"
        weight = torch.cat([model.get_submodule(f"{path}.{role}_proj").weight.data for role in "kv"])
        fisher = torch.block_diag(*(sums[f"{path}.{role}_proj/g"] / tokens for role in "kv"))
        projector = joint(weight, sums[f"{path}.k_proj/x"] / tokens, fisher, Damping())
        inner = tensors[f"{path}.lr_latent.weight"]
        left, right = factors(weight, projector, len(inner))
        product = tensors[f"{path}.lr_rebuild.weight"].double() @ inner.double()
        torch.testing.assert_close(product, left @ right, rtol=0, atol=2e-4 * float(weight.abs().max()))


@pytest.mark.parametrize("method", ["modegpt", "kfac"])
@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neox", "phi3", "qwen2_moe"])
def test_other_families(tiny: Tiny, tmp_path: Path, model_type: str, method: str) -> None:
    if model_type == "qwen2_moe":
        from tests.moe import save_moe

        save_moe(model_type, model := tmp_path / "dense")
    else:
        model = save_tiny(model_type, tmp_path / "dense")
    run, text = tmp_path / "run", ("--calibration", tiny.text, *FEW)
    done("compress", model, "--method", method, "--ratio", 0.2, *text, "--out", run)
    whole = measure_size(Checkpoint(model)).kv_bytes_per_token
    before = measure_size(Checkpoint(run / "model")).kv_bytes_per_token
    done("cache", run, "--kv-ratio", 1 - before / whole / 2)
    found = report(run / "cache")
    assert found["stored_elements"] == measure_size(Checkpoint(run / "cache")).blocks
    made, options = loaded(run / "cache"), {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert made.generate(IDS, **options).equal(made.generate(IDS, **options, use_cache=False))
    done("export", run, "--dense", tmp_path / "stock")
    torch.testing.assert_close(logits(run / "cache"), logits(tmp_path / "stock"), rtol=0, atol=3e-5)
    done("verify", run)


def test_the_same_bytes_after_a_crash(runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, again = tmp_path / "first", tmp_path / "again"
    for run in (first, again):
        shutil.copytree(runs["pivot"], run)
    done("cache", first, "--kv-ratio", 0.5)
    made, decompose = list[str](), LatentGroup.decompose

    def counted(group: LatentGroup, *arguments: Any) -> Any:
        made.append(group.name)
        if len(made) == 2:
            raise KeyboardInterrupt
        return decompose(group, *arguments)

    monkeypatch.setattr(LatentGroup, "decompose", counted)
    lrc("cache", again, "--kv-ratio", 0.5)
    assert not (again / "cache").exists()
    done("cache", again, "--kv-ratio", 0.5)
    assert len(made) == 3 == len(set(made)) + 1
    assert results(first) == results(again)
    before = times(first / "cache")
    done("cache", first, "--kv-ratio", 0.5)
    assert times(first / "cache") == before
    assert "--overwrite" in refused("cache", first, "--kv-ratio", 0.6)
    done("cache", first, "--kv-ratio", 0.6, "--overwrite")
    assert report(first / "cache")["cache"]["kept"] <= 25


def test_what_follows(runs: dict[str, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs["narrow"], run)
    done("cache", run, "--kv-ratio", 0.7)
    said = done("recover", run, "--steps", 20, "--batch", 4, "--json").json
    assert said["recover"]["loss_after"] < said["recover"]["loss_before"]
    done("quantize", run, "--bits", 8, "--rounding", "rtn")
    assert report(run / "quantize")["stored_bytes"] == measure_size(Checkpoint(run / "quantize")).block_bytes
    done("verify", run)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ("--kv-ratio", 0.99),
            "A --kv-ratio of 0.99 is out of reach: of 64 numbers that the cache keeps of a token, 2",
        ),
        (("--kv-ratio", 1.5), "kv_ratio"),
        (("--kv-ratio", 0.5, "--calibration", "self"), "--calibration self is for dense models"),
    ],
)
def test_what_cannot_be(runs: dict[str, Path], more: tuple[object, ...], message: str) -> None:
    assert message in " ".join(refused("cache", runs["pair"], *more).split())


def test_what_is_refused(runs: dict[str, Path], tiny: Tiny, tmp_path: Path) -> None:
    out, text = ("--out", tmp_path / "out"), ("--calibration", tiny.text, *FEW)
    assert "lrc compress --method dense --kv-ratio 0.5" in refused("cache", tiny.model, "--kv-ratio", 0.5, *text, *out)
    assert "name one with --calibration" in refused("cache", runs["pair"] / "model", "--kv-ratio", 0.5, *out)
    assert "no more than --kv-ratio 0.01 allows" in refused("cache", runs["narrow"], "--kv-ratio", 0.01)
    done("cache", runs["pair"], "--kv-ratio", 0.5, "--out", tmp_path / "latent")
    said = refused("cache", tmp_path / "latent", "--kv-ratio", 0.7, *text, *out)
    assert "keeps latents already" in said
    done("quantize", runs["pair"], "--bits", 8, "--rounding", "rtn", "--out", tmp_path / "few")
    assert "Name the checkpoint that it was quantized from" in refused(
        "cache", tmp_path / "few", "--kv-ratio", 0.7, *text, *out
    )
