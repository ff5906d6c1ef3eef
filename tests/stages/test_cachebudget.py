"""Runs whose checkpoints cache latents: two budgets, and every command that follows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lowrank_compress.evaluation.size import measure_size
from lowrank_compress.model.checkpoint import Checkpoint
from lowrank_compress.model.reconstruction import reconstruction
from lowrank_compress.shipped.latent import LatentAttention
from tests.moe import save_moe
from tests.runs import FEW, Tiny, block_file, done, refused, results, times
from tests.shipped.test_loading import python
from tests.tiny import save_tiny

IDS = torch.arange(4, 44).view(2, 20)
# Numbers of a token in the tiny llama's cache, and of a hidden state: 2 blocks, 2 key-value heads of 8.
CACHED, HIDDEN = 64, 32


@pytest.fixture(scope="module")
def runs(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("caches")
    options = {
        "alone": ("--method", "dense", "--kv-ratio", 0.4),
        "windowed": ("--method", "dense", "--kv-ratio", 0.75, "--kv-window", 5),
        "both": ("--ratio", 0.3, "--kv-ratio", 0.5),
    }
    for name, more in options.items():
        run = place / name
        done("compress", tiny.model, *more, "--calibration", tiny.text, *FEW, "--out", run)
    return {name: place / name for name in options}


def report(run: Path) -> dict[str, Any]:
    return json.loads((run / "model/lowrank.json").read_text())


def ranks(run: Path) -> dict[str, int]:
    """Numbers that each block caches."""
    matrices = json.loads((run / "scores/ranks.json").read_text())["matrices"]
    return {name: entry["rank"] or CACHED // 2 for name, entry in matrices.items() if name.endswith(":key-value")}


def loaded(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path)


def logits(path: Path) -> torch.Tensor:
    with torch.no_grad():
        return loaded(path)(IDS).logits


@pytest.mark.slow
def test_two_budgets(runs: dict[str, Path]) -> None:
    for name, most in (("alone", 38), ("windowed", 16), ("both", 32)):
        found, said = report(runs[name]), ranks(runs[name])
        assert len(said) == 2
        kept = sum(said.values())
        assert most - 2 < kept <= most
        assert found["cache"]["dense"] == CACHED
        assert found["cache"]["kept"] == kept
        assert found["cache"]["reached"] == pytest.approx(1 - kept / CACHED)
    assert [report(runs[name])["cache"]["window"] for name in runs] == [0, 5, 0]
    # The factors are counted: in the place of keys and values, or beside them.
    alone, windowed, both = (report(runs[name]) for name in runs)
    whole = alone["claimed_elements"]
    assert alone["stored_elements"] == whole + sum(ranks(runs["alone"]).values()) * 64 - CACHED * HIDDEN
    assert windowed["stored_elements"] == whole + sum(ranks(runs["windowed"]).values()) * 64
    assert alone["asked_ratio"] == windowed["asked_ratio"] == 0
    assert both["reached_ratio"] >= 0.3
    for name in runs:
        size = sum(
            t.numel()
            for n, t in load_file(runs[name] / "model/model.safetensors").items()
            if "layers" in n and "norm" not in n
        )
        assert size == report(runs[name])["stored_elements"]


@pytest.mark.slow
def test_a_dense_export_computes_the_same(runs: dict[str, Path], tiny: Tiny, tmp_path: Path) -> None:
    for name in ("alone", "both"):
        assert "smaller cache" not in done("export", runs[name], "--dense", tmp_path / name).text
        torch.testing.assert_close(logits(runs[name] / "model"), logits(tmp_path / name), rtol=0, atol=3e-5)
    # With a window, all keys and values are exact there.
    assert "without a smaller cache" in done("export", runs["windowed"], "--dense", tmp_path / "windowed").text
    assert logits(tmp_path / "windowed").equal(logits(tiny.model))
    assert (logits(runs["windowed"] / "model") - logits(tiny.model)).abs().max() > 1e-4


def test_what_follows(runs: dict[str, Path], tiny: Tiny, tmp_path: Path) -> None:
    for name in runs:
        run = tmp_path / name
        shutil.copytree(runs[name], run)
        done("verify", run)
        assert "numbers a token became" in done("show", run).out
        done("refresh", run)
        said = done("eval", run, "--perplexity", tiny.heldout, "--seq-len", 64, "--json").json
        assert said["size"]["kv_bytes_per_token"]["dense"] == 4 * CACHED
        kept = report(run)["cache"]["kept"]
        assert said["size"]["kv_bytes_per_token"]["compressed"] == 4 * kept
        window = 4 * (4 * CACHED if name == "windowed" else 0)
        assert said["size"]["kv_bytes_4096"]["compressed"] == 4 * 4096 * kept + window
        done("cast", run, "--dtype", "bfloat16")
        model = loaded(run / "cast")
        assert model.dtype == torch.bfloat16
        assert isinstance(model.get_submodule("model.layers.0.self_attn"), LatentAttention)
        assert model.generate(IDS, max_new_tokens=8, do_sample=False).shape == (2, 28)


@pytest.mark.slow
def test_saved_and_loaded_without_the_package(runs: dict[str, Path], tmp_path: Path) -> None:
    expected = {}
    for name in ("alone", "windowed"):
        model = loaded(runs[name] / "model")
        model.save_pretrained(tmp_path / name)
        assert logits(tmp_path / name).equal(logits(runs[name] / "model"))
        torch.save(model.generate(IDS, max_new_tokens=8, do_sample=False), tmp_path / f"{name}.pt")
        expected[name] = str(tmp_path / name)
    code = f"""
import sys
sys.modules["lowrank_compress"] = None
import torch
from transformers import AutoModelForCausalLM
for path in {list(expected.values())}:
    model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
    found = model.generate(torch.arange(4, 44).view(2, 20), max_new_tokens=8, do_sample=False)
    assert found.equal(torch.load(path + ".pt"))
"""
    python(code, cache=tmp_path)


def test_the_same_bytes_after_a_crash(runs: dict[str, Path], tiny: Tiny, tmp_path: Path) -> None:
    run = tmp_path / "again"
    shutil.copytree(runs["windowed"], run)
    expected = results(run)
    # As a process leaves it that is killed while it scores: a basis, and no ranks.
    block_file(run / "scores", "basis", 1).unlink()
    shutil.rmtree(run / "model")
    for name in ("scores/manifest.json", "scores/ranks.json", "run.json"):
        (run / name).unlink()
    done("compress", "--config", run / "recipe.yaml", "--out", run)
    assert results(run) == expected
    before = times(run / "model")
    done("compress", "--config", run / "recipe.yaml", "--out", run)
    assert times(run / "model") == before


def test_edited_ranks_are_followed(runs: dict[str, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs["alone"], run)
    path = run / "scores/ranks.json"
    edited = json.loads(path.read_text())
    first, second = [name for name in edited["matrices"] if name.endswith(":key-value")]
    edited["matrices"][first] |= {"rank": 7}
    edited["matrices"][second] |= {"format": "dense", "rank": None}
    path.write_text(json.dumps(edited))
    said = done("factorize", run, "--overwrite", "--json").json
    assert said["cache"]["kept"] == 7 + CACHED // 2
    layout = json.loads((run / "model/config.json").read_text())["quantization_config"]
    assert [entry["latent"]["rank"] for entry in layout["attention"].values()] == [7]
    edited["matrices"][first] |= {"rank": 32}
    path.write_text(json.dumps(edited))
    assert "has format 'latent' and rank 32; expected a rank from 1 to 31" in refused("factorize", run, "--overwrite")


def test_another_ratio_from_kept_bases(runs: dict[str, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs["alone"], run)
    done("score", run, "--kv-ratio", 0.8, "--overwrite")
    done("factorize", run, "--overwrite")
    assert sum(ranks(run).values()) == 12
    assert report(run)["cache"]["asked"] == 0.8


@pytest.mark.slow
@pytest.mark.parametrize("train", ["all", "low-rank"])
def test_recovery_trains_what_rebuilds(runs: dict[str, Path], tmp_path: Path, train: str) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs["both" if train == "all" else "windowed"], run)
    said = done("recover", run, "--json", "--steps", 20, "--batch", 4, "--train", train).json
    assert said["recover"]["loss_after"] < said["recover"]["loss_before"]
    before, after = (load_file(run / name / "model.safetensors") for name in ("model", "recover"))
    assert before.keys() == after.keys()
    for factor in ("lr_latent", "lr_rebuild"):
        name = f"model.layers.0.self_attn.{factor}.weight"
        assert not before[name].equal(after[name])
    done("verify", run)


@pytest.mark.parametrize("name", ["alone", "windowed"])
def test_blocks_by_themselves_train_what_rebuilds(runs: dict[str, Path], tmp_path: Path, name: str) -> None:
    options = ("--block", "--block-steps", 8, "--steps", 0, "--batch", 4, "--train", "low-rank")
    for number in (1, 2):
        shutil.copytree(runs[name], tmp_path / f"run{number}")
        said = done("recover", tmp_path / f"run{number}", *options, "--json").json
        assert said["recover"]["blocks"]["loss_after"] < said["recover"]["blocks"]["loss_before"]
    tensors = [load_file(tmp_path / place / "model.safetensors") for place in ("run1/model", "run1/recover")]
    changed = {leaf for leaf, tensor in tensors[0].items() if not tensor.equal(tensors[1][leaf])}
    assert changed
    assert all(leaf.endswith(("lr_latent.weight", "lr_rebuild.weight")) for leaf in changed)
    assert results(tmp_path / "run1") == results(tmp_path / "run2")


def test_all_that_is_computed_with_is_compared(runs: dict[str, Path]) -> None:
    """`lrc compress --check` compares products, whatever the factors."""
    found = {name: list(tensors) for name, tensors in reconstruction(Checkpoint(runs["windowed"] / "model"))}
    products = found["model.layers.0.self_attn:key-value"]
    tensors = load_file(runs["windowed"] / "model/model.safetensors")
    path = "model.layers.0.self_attn"
    product = tensors[f"{path}.lr_rebuild.weight"] @ tensors[f"{path}.lr_latent.weight"]
    torch.testing.assert_close(torch.cat(products).float(), product)
    alone = {name: list(tensors) for name, tensors in reconstruction(Checkpoint(runs["alone"] / "model"))}
    assert not any(name.endswith(":key-value") for name in alone)
    assert (
        torch.linalg.matrix_rank(alone[f"{path}.k_proj"][0].double())
        <= (ranks(runs["alone"])["model.layers.0:key-value"])
    )


def test_what_it_prints_beforehand(tiny: Tiny, tmp_path: Path) -> None:
    options = ("--calibration", tiny.text, *FEW, "--out", tmp_path / "run", "--dry-run")
    said = done("compress", tiny.model, "--method", "dense", "--kv-ratio", 0.5, "--kv-window", 3, *options)
    assert "of 64 numbers a token it may keep 32, and exact keys and values of the last 3 tokens" in said.out
    found = done("compress", tiny.model, "--kv-ratio", 0.5, *options, "--json").json
    assert found["cache"] == {"ratio": 0.5, "dense": 64, "largest_kept": 32, "window": 0}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--kv-window", 4), "--kv-window keeps exact positions beside a cache of latents: pass --kv-ratio, too"),
        (("--kv-ratio", 0.5, "--qk", "cr"), "cr makes the heads of queries and keys narrower, and --kv-ratio rebuilds"),
        (("--kv-ratio", 0.5, "--method", "modegpt"), "cr makes the heads of queries and keys narrower"),
        (("--kv-ratio", 0.5, "--vo", "vo-svd"), "vo-svd makes the heads of values and output narrower"),
        (("--kv-ratio", 0.5, "--ratio", 0, "--mlp", "svd"), "--ratio 0 compresses nothing but the cache"),
        (
            ("--kv-ratio", 0.99),
            "A --kv-ratio of 0.99 is out of reach: of 64 numbers that the cache keeps of a token, 2",
        ),
        (("--kv-ratio", 0.8, "--round-to", 8), "The largest reachable one is 0.75. Ask for no more, or pass a smaller"),
        (("--kv-ratio", 1.5), "kv_ratio"),
        (("--ratio", 0), "--ratio 0.0 is not between 0 and 1"),
    ],
)
def test_what_cannot_be(tiny: Tiny, tmp_path: Path, more: tuple[object, ...], message: str) -> None:
    said = refused("compress", tiny.model, *more, "--calibration", tiny.text, *FEW, "--out", tmp_path / "run")
    assert message in " ".join(said.split())


@pytest.mark.parametrize(
    ("model_type", "task", "more", "message"),
    [
        ("mistral", "lm", {}, "cannot cache a latent: it sees a sliding window of tokens"),
        ("gemma3_text", "lm", {}, "cannot cache a latent: it sees a sliding window of tokens"),
        ("bert", "classification", {}, "generates nothing and has none"),
        (
            "llama",
            "lm",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 5000.0, "factor": 2.0}},
            r"its rotary embeddings (dynamic) depend on how long the text is",
        ),
    ],
)
def test_models_whose_cache_stays(
    tiny: Tiny, tmp_path: Path, model_type: str, task: Any, more: dict[str, Any], message: str
) -> None:
    model = save_tiny(model_type, tmp_path / "model", task, **more)
    options = ("--kv-ratio", 0.5, "--method", "dense", "--calibration", tiny.text, *FEW, "--out", tmp_path / "run")
    assert message in refused("compress", model, *options)


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neox", "qwen3"])
def test_other_families(tiny: Tiny, tmp_path: Path, model_type: str) -> None:
    model, run = save_tiny(model_type, tmp_path / "model"), tmp_path / "run"
    window = () if model_type == "gpt2" else ("--kv-window", 3)
    done(
        *("compress", model, "--method", "svd-llm", "--ratio", 0.1, "--kv-ratio", 0.75, *window),
        *("--calibration", tiny.text, *FEW, "--out", run),
    )
    found = loaded(run / "model")
    assert report(run)["cache"]["reached"] >= 0.75
    assert report(run)["reached_ratio"] >= 0.1
    with torch.no_grad():
        whole = found(IDS).logits
    assert torch.isfinite(whole).all()
    done("eval", run, "--perplexity", tiny.heldout, "--seq-len", 64)


@pytest.mark.parametrize("name", ["alone", "windowed", "both"])
def test_a_cache_run_is_quantized(runs: dict[str, Path], name: str, tmp_path: Path) -> None:
    said = done("quantize", runs[name], "--bits", 8, "--rounding", "rtn", "--out", tmp_path / "q", "--json").json
    before, after = (
        json.loads((place / "lowrank.json").read_text()) for place in (runs[name] / "model", tmp_path / "q")
    )
    assert (
        after["stored_bytes"]
        == said["quantize"]["stored_bytes"]
        == measure_size(Checkpoint(tmp_path / "q")).block_bytes
    )
    assert after["reached_ratio_bytes"] == pytest.approx(1 - after["stored_bytes"] / before["claimed_bytes"])
    if name != "windowed":  # a dense export's keys and values are exact within a window
        done("export", tmp_path / "q", "--dense", tmp_path / "dense")
        torch.testing.assert_close(logits(tmp_path / "q"), logits(tmp_path / "dense"), rtol=1e-4, atol=1e-4)


def test_a_page_tells_what_the_cache_keeps_beside_matrices_that_stay(runs: dict[str, Path], tmp_path: Path) -> None:
    done("report", runs["windowed"], "--out", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    for rank in ranks(runs["windowed"]).values():
        assert f"{100 * rank / (CACHED // 2):.0f} %<br><small>{rank}</small>" in page


def test_a_mixture_of_experts_caches_latents_too(tiny: Tiny, tmp_path: Path) -> None:
    save_moe("qwen2_moe", tmp_path / "dense")
    run = tmp_path / "run"
    options = ("--method", "kfac", "--kv-ratio", 0.5, "--kv-window", 4, "--calibration", tiny.text, *FEW)
    done("compress", tmp_path / "dense", "--ratio", 0.15, *options, "--out", run)
    assert report(run)["cache"]["kept"] == CACHED // 2
    assert all(isinstance(layer.self_attn, LatentAttention) for layer in loaded(run / "model").model.layers)
    done("eval", run, "--perplexity", tiny.heldout)


def test_layers_of_a_mixture_that_see_a_window_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    windows = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    save_moe("qwen2_moe", tmp_path / "dense", **windows)
    options = ("--method", "dense", "--kv-ratio", 0.5, "--calibration", tiny.text, *FEW, "--out", tmp_path / "run")
    assert "it sees a sliding window of tokens" in refused("compress", tmp_path / "dense", *options)
