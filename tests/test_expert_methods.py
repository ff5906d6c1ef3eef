"""`--experts`: methods for all experts of a block, from a checkpoint to a compressed one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer

import lowrank_compress
from tests.moe import save_moe
from tests.ordinary import tokens
from tests.runs import done, refused
from tests.test_experts import LEFT_OUT, compress, load, logits_of
from tests.test_experts import place as place
from tests.tiny import save_tiny

assert lowrank_compress.__version__


@pytest.fixture(scope="module")
def pruned(place: Path) -> Path:
    return compress(place, "mixtral", place / "reap", "--method", "reap", ratio=0.2)


def settings_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "model/config.json").read_text())["quantization_config"]


def check_counts(run: Path, ratio: float) -> dict[str, Any]:
    report = json.loads((run / "model/lowrank.json").read_text())
    stored = sum(
        tensor.numel()
        for name, tensor in load_file(run / "model/model.safetensors").items()
        if ".layers." in name and not name.endswith(LEFT_OUT)
    )
    assert report["stored_elements"] == stored
    assert report["reached_ratio"] >= ratio
    return report


def without(model: Any, gone: dict[int, list[int]]) -> Any:
    """The stock model, whose routers give experts that are gone logits of -inf."""
    for block, numbers in gone.items():
        router = model.get_submodule(f"model.layers.{block}.mlp.gate")

        def forward(x: Tensor, router: Any = router, numbers: list[int] = numbers) -> tuple[Tensor, ...]:
            logits = x.reshape(-1, x.shape[-1]) @ router.weight.T
            logits[:, numbers] = float("-inf")
            weights, index = logits.softmax(-1).topk(2)
            return logits, weights / weights.sum(-1, keepdim=True), index

        router.forward = forward
    return model


def test_removed_experts_are_those_that_the_router_forgets(pruned: Path, place: Path, tmp_path: Path) -> None:
    report = check_counts(pruned, 0.2)
    entries = report["matrices"]
    assert {name: (entry["shape"], entry["rank"]) for name, entry in entries.items()} == {
        f"model.layers.{block}:experts": ([4], 3) for block in range(2)
    }
    settings = settings_of(pruned)
    assert settings["routers"] == {f"model.layers.{block}.mlp.gate": {"experts": 4, "kept": 3} for block in range(2)}
    assert settings["version"] == 6
    gone = {
        block: [n for n in range(4) if f"model.layers.{block}.mlp.experts.{n}.lr_up" in settings["dense_shapes"]]
        for block in range(2)
    }
    assert all(len(numbers) == 1 for numbers in gone.values())
    model = load(pruned / "model")
    expected = logits_of(without(load(place / "mixtral"), gone))
    torch.testing.assert_close(logits_of(model), expected, rtol=1e-5, atol=1e-6)
    # What says how tokens were shared keeps its shape.
    found = model(torch.stack(tokens(9, 9)), output_router_logits=True, labels=torch.stack(tokens(9, 9)))
    for block, logits in enumerate(found.router_logits):
        assert logits.shape == (18, 4)
        assert logits.isinf().nonzero()[:, 1].unique().tolist() == gone[block]
    assert found.loss.isfinite()
    assert 1 <= found.aux_loss.item() < 4
    shown = done("show", pruned, "--json").json["experts"]
    for path, expert in shown.items():
        block, number = int(path.split(".")[2]), int(path.split(".")[-1])
        assert expert["width"] == (0 if number in gone[block] else 40)
        assert expert["stored"] == expert["width"] * 3 * 32
    for block in range(2):  # two of four experts a token, of eight windows
        assert sum(expert["tokens"] for path, expert in shown.items() if f".{block}.mlp" in path) == 2 * 8 * 32
    assert "Routed experts" in done("show", pruned).out
    assert {file["state"] for file in done("verify", pruned, "--json").json["files"]} == {"intact", "dropped"}


def test_it_is_saved_and_generates_and_is_measured(pruned: Path, place: Path, tmp_path: Path) -> None:
    model = load(pruned / "model")
    expected = logits_of(model)
    for implementation in ("batched_mm", "grouped_mm"):
        assert torch.equal(logits_of(load(pruned / "model", experts_implementation=implementation)), expected)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits_of(load(tmp_path / "saved")), expected)
    assert (
        load(pruned / "model", dtype=torch.bfloat16).get_buffer("model.layers.0.mlp.gate.lr_kept").dtype == torch.int32
    )
    prompt = torch.stack(tokens(7, 7))
    made = [
        model.generate(prompt, max_new_tokens=6, min_new_tokens=6, do_sample=False, use_cache=cache)  # pyright: ignore
        for cache in (True, False)
    ]
    assert torch.equal(*made)
    text = place / "text.txt"
    found = done(
        "eval", pruned / "model", "--perplexity", text, "--seq-len", 32, "--limit", 2, "--force", "--json"
    ).json
    tokenizer = AutoTokenizer.from_pretrained(pruned / "model")
    found_ids = tokenizer(text.read_text(), add_special_tokens=False).input_ids
    ids = torch.tensor([[tokenizer.bos_token_id, *found_ids[31 * n : 31 * n + 31]] for n in range(2)])
    with torch.no_grad():
        expected = float(model(ids, labels=ids).loss.exp())
    assert found["perplexity"][str(text)] == {"compressed": pytest.approx(expected, rel=1e-5), "tokens": 62}


def test_a_stock_router_of_all_experts_would_choose_removed_ones(pruned: Path, tmp_path: Path) -> None:
    said = refused("export", pruned, "--dense", tmp_path / "dense")
    assert "model.layers.0.mlp.gate chooses among 3 of 4 experts, and a stock router would choose those" in said
    assert not (tmp_path / "dense").exists()
    model = load(pruned / "model")
    with pytest.raises(ValueError, match="chooses among 3 of 4 experts; the others are gone"):
        model.hf_quantizer.dequantize(model)  # pyright: ignore


def test_camera_is_exported_dense(place: Path, tmp_path: Path) -> None:
    run = compress(place, "deepseek_v3", tmp_path / "run", "--method", "camera", ratio=0.4)
    report = check_counts(run, 0.4)
    assert report["reached_ratio"] < 0.42
    assert "routers" not in settings_of(run)
    assert settings_of(run)["version"] == 4
    model = load(run / "model")
    done("export", run, "--dense", tmp_path / "dense")
    torch.testing.assert_close(logits_of(load(tmp_path / "dense")), logits_of(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        ("mixtral", ("--experts", "reap-sum")),  # auto elsewhere, whole plans are tried and refined
        ("qwen2_moe", ("--experts", "frequency", "--method", "svd", "--allocate", "loss")),
        ("qwen3_moe", ("--for", "experts=camera", "--method", "kfac", "--storage", "auto", "--allocate", "loss")),
        ("olmoe", ("--experts", "reap", "--attention", "svd-llm", "--method", "reap")),
        # Beside MLPs that are alternatives, which compare in a unit of their own.
        ("qwen2_moe", ("--experts", "reap-sum")),
        ("deepseek_v2", ("--experts", "frequency")),
    ],
)
def test_one_budget_with_other_methods(model_type: str, options: tuple[str, ...], place: Path, tmp_path: Path) -> None:
    run = compress(place, model_type, tmp_path / "run", *options, ratio=0.35)
    report = check_counts(run, 0.35)
    assert report["unit"] == "relative"
    assert any(name.endswith(":experts") for name in report["matrices"])
    assert any("self_attn" in name for name in report["matrices"])
    assert logits_of(load(run / "model")).isfinite().all()


def test_what_cannot_be_is_refused(place: Path, tmp_path: Path) -> None:
    text = ("--calibration", place / "text.txt", "--out", tmp_path / "run")
    save_tiny("llama", tmp_path / "llama")
    for options in (("--method", "reap"), ("--experts", "camera")):
        said = refused("compress", tmp_path / "llama", *text, *options)
        assert f"The method {options[1]!r} is for routed experts, and models of architecture 'llama' have none" in said
    model = place / "mixtral" if (place / "mixtral").exists() else save_moe("mixtral", place / "mixtral")
    for options in (
        ("--experts", "reap", "--for", "down=svd"),
        ("--method", "svd", "--for", "*.0.mlp.experts.1.*=reap"),
        ("--method", "svd", "--for", "up=camera"),
    ):
        assert "is for all experts of a block as a whole" in refused("compress", model, *text, *options)
    said = refused("compress", model, *text, "--experts", "reap|nystrom")
    assert "are not a linear method and a module method" in said
    said = refused("compress", model, *text, "--method", "reap", "--ratio", "0.9")
    assert "The largest reachable ratio is 0.4165" in said
    v3 = place / "deepseek_v3" if (place / "deepseek_v3").exists() else save_moe("deepseek_v3", place / "deepseek_v3")
    said = refused("compress", v3, *text, "--experts", "reap-sum")
    assert "reap-sum cannot take experts from 'deepseek_v3', because its router cannot do with fewer" in said
    assert not (tmp_path / "run").exists()
