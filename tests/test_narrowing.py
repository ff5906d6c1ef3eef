"""Module methods on every architecture: what a model has no use for is found, removed, and nothing else.

The models are made redundant by hand: some dimensions of queries and keys (whole rotary pairs), some directions of the
values and some hidden units are zero. At a ratio that fits, every module method must give the dense model's logits.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tests.families import family, register
from tests.ordinary import key_heads, load, padded, part_rows, task, tokens
from tests.runs import done, refused
from tests.tiny import MODELS, NARROWED, WHOLE_HEADS, tiny_model, tiny_text, tiny_tokenizer

ROLES = {
    "q": ("q_proj", "query", "q_lin", "attn.q", ":q"),
    "k": ("k_proj", "key", "k_lin", "attn.k", ":k"),
    "v": ("v_proj", "value", "v_lin", "attn.v", ":v"),
    "gate": ("gate_proj", ":gate"),
    "up": ("up_proj", "fc_in", "c_fc", "dense_h_to_4h", "fc1", "intermediate.dense", "lin1", ":up"),
}
FUSED = {
    "phi3": ("qkv_proj", "gate_up_proj"),
    "modernbert": ("Wqkv", "Wi"),
    "glm": ("gate_up_proj",),
    "glm4": ("gate_up_proj",),
    "gpt2": ("c_attn",),
    "gpt_bigcode": ("c_attn",),
    "gpt_neox": ("query_key_value",),
}
HEAD_NORMS = ("qwen3", "gemma3_text", "olmo2")
METRICS = ("gram", "kfac")
# Every model with one of the metrics, some with both.
CASES = [(name, METRICS[number % 2]) for number, name in enumerate(NARROWED)]
CASES += [(name, METRICS[1 - number % 2]) for number, name in enumerate(MODELS) if name in ("llama-lm", "gpt2-lm")]
MIXED = (
    "--method cr --ratio 0.05",
    "--method vo-svd --ratio 0.05",
    "--method nystrom --ratio 0.1",
    "--method auto --mlp nystrom",
    "--method svd-llm --storage pivot --vo vo-svd",
    "--method kfac --attention modegpt --allocate loss",
    "--method svd --qk cr --vo dense --ratio 0.1",
    "--method auto --qk kfac|cr --vo kfac|vo-svd",
)
LAYOUTS = ("llama-lm", "gpt2-lm", "gpt_neox-lm", "phi3-lm", "bert-classification")
PARTS = [(LAYOUTS[number % 5], parts) for number, parts in enumerate(MIXED)]


def targets_of(model: PreTrainedModel) -> dict[tuple[str, str], str]:
    """(role, block prefix) -> target name, found by the names of the modules."""
    found: dict[tuple[str, str], str] = {}
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear | Conv1D) or not any(part.isdigit() for part in name.split(".")):
            continue
        parts = name.split(".")
        block = ".".join(parts[: [part.isdigit() for part in parts].index(True) + 1])
        fused = [leaf for leaf in FUSED.get(model.config.model_type, ()) if name.endswith(leaf)]
        own = (
            [f"{name}:{role}" for role in (("gate", "up") if name.endswith(("gate_up_proj", "Wi")) else "qkv")]
            if fused
            else [name]
        )
        for target in own:
            for role, ends in ROLES.items():
                if target.endswith(ends):
                    found[role, block] = target
    return found


def make_redundant(model: PreTrainedModel) -> None:
    """Zero a quarter of the pairs of every key head, of the directions of every value head, of the hidden units."""
    config = model.config
    query = config.num_attention_heads
    keys = key_heads(config)
    generator = torch.Generator().manual_seed(3)
    targets = targets_of(model)
    blocks = {block for _, block in targets}
    with torch.no_grad():
        for block in sorted(blocks):
            rows = {role: rows_of(model, targets[role, block]) for role in ROLES if (role, block) in targets}
            size = len(rows["k"][1]) // keys
            rotary = rotated(model, size)
            for head in range(keys):
                if config.model_type not in HEAD_NORMS:
                    lost = lost_dimensions(size, rotary, generator)
                    group = query // keys
                    for h in range(head * group, (head + 1) * group):
                        zero(rows["q"], h * size + lost)
                    zero(rows["k"], head * size + lost)
                spread(rows["v"], slice(head * size, (head + 1) * size), generator)
            units = torch.randperm(len(rows["up"][1]), generator=generator)
            lost = units[: len(units) // 4]
            for role in {"up", "gate"} & rows.keys():
                zero(rows[role], lost)


def rotated(model: PreTrainedModel, size: int) -> int:
    buffers = [buffer for name, buffer in model.named_buffers() if name.endswith("inv_freq")]
    return 2 * len(buffers[0]) if buffers else 0


def lost_dimensions(size: int, rotary: int, generator: torch.Generator) -> Tensor:
    """A quarter of the dimensions; rotated ones in pairs, and one pair only of those that are not."""
    if not rotary:
        return torch.randperm(size, generator=generator)[: size // 4]
    half = rotary // 2
    kept = 2 * int(0.79 * size / 2)  # the width that is even and at most what a ratio of 0.2 leaves
    pairs = torch.randperm(half, generator=generator)[: (size - kept) // 2]
    return torch.cat([pairs, pairs + half])


def rows_of(model: PreTrainedModel, target: str) -> tuple[Any, Tensor]:
    path, rows = part_rows(model, target)
    return model.get_submodule(path), rows


def zero(part: tuple[Any, Tensor], which: Tensor) -> None:
    module, rows = part
    weight = module.weight.T if isinstance(module, Conv1D) else module.weight
    weight[rows[which]] = 0
    if module.bias is not None:
        module.bias[rows[which]] = 0


def spread(part: tuple[Any, Tensor], head: slice, generator: torch.Generator) -> None:
    """Make a head's values lie in three quarters of its dimensions, in no special direction."""
    module, rows = part
    weight = module.weight.T if isinstance(module, Conv1D) else module.weight
    size = head.stop - head.start
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator)).Q[:, : size - size // 4]
    weight[rows[head]] = basis @ basis.T @ weight[rows[head]]
    if module.bias is not None:
        module.bias[rows[head]] = basis @ basis.T @ module.bias[rows[head]]


def save_redundant(name: str, place: Path) -> tuple[Path, list[str]]:
    """Write a redundant model; its directory, and the options that calibrate on data of its kind."""
    model_type, kind, overrides = MODELS[name]
    return write_redundant(tiny_model(model_type, kind, **overrides), kind, place)


def write_redundant(model: PreTrainedModel, kind: str, place: Path) -> tuple[Path, list[str]]:
    """Make a model redundant and write it, and data to calibrate on."""
    make_redundant(model)
    model.save_pretrained(place / "dense")
    tiny_tokenizer(place / "dense")
    columns: list[str] = []
    if kind == "lm":
        data = place / "text.txt"
        data.write_text(tiny_text(4000))
    else:
        data = place / "rows.tsv"
        columns = ["--text-column", "sentence", "--label-column", "label"]
        with open(data, "w", newline="") as handle:
            writer = csv.writer(handle, delimiter="\t", lineterminator="\n")
            writer.writerow(["sentence", "label"])
            writer.writerows((tiny_text(90, seed=i).replace("\n", " ").strip(), f"LABEL_{i % 3}") for i in range(24))
    return place / "dense", ["--calibration", str(data), *columns, "--samples", "24", "--seq-len", "24"]


def logits_of(model: PreTrainedModel) -> Tensor:
    ids, mask = padded(tokens(19, 14, 17))
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask).logits
    return logits[mask.bool()] if logits.ndim == 3 else logits


@pytest.mark.parametrize(("name", "metric"), CASES)
def test_what_is_redundant_is_removed_and_nothing_else(name: str, metric: str, tmp_path: Path) -> None:
    model, data = save_redundant(name, tmp_path)
    normed = MODELS[name][0] in HEAD_NORMS
    own = ["--qk", "dense"] if normed else []
    run = tmp_path / "run"
    ratio = 0.12 if normed else 0.2
    options = ["--method", "modegpt", "--metric", metric, "--allocate", "uniform", "--ratio", ratio, *own]
    done("compress", model, *options, *data, "--out", run)
    report = json.loads((run / "model" / "lowrank.json").read_text())
    assert all(entry["rank"] is not None for entry in report["matrices"].values())
    dense, small = load(model, task(name)), load(run / "model", task(name))
    expected, found = logits_of(dense), logits_of(small)
    assert (found - expected).abs().max() <= 2e-4 * (expected - expected.mean()).abs().max()
    check_counts(run, report)
    exported = tmp_path / "exported"
    done("export", run, "--dense", exported)
    stock = load(exported, task(name))
    assert type(stock.get_submodule(attention_of(stock))) is type(dense.get_submodule(attention_of(dense)))
    torch.testing.assert_close(logits_of(stock), found, rtol=0, atol=1e-5 * float(expected.abs().max()))
    if task(name) == "lm":
        assert_cache_shrinks_and_does_not_matter(small, run, report)


def attention_of(model: PreTrainedModel) -> str:
    names = [name for name, _ in model.named_modules() if name.endswith((".self_attn", ".attn", ".attention", ".self"))]
    return max(names, key=len)


def check_counts(run: Path, report: dict[str, Any]) -> None:
    """Compare the report with the tensors: whatever is not in the dense model's other tensors stands for weights."""
    size = done("eval", run, "--json").json["size"]["blocks"]
    assert size["dense"] == report["claimed_elements"]
    assert size["compressed"] == report["stored_elements"]
    assert 1 - size["compressed"] / size["dense"] == pytest.approx(report["reached_ratio"])
    assert report["reached_ratio"] >= report["asked_ratio"]
    tensors = load_file(run / "model" / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in tensors.values())


def assert_cache_shrinks_and_does_not_matter(model: PreTrainedModel, run: Path, report: dict[str, Any]) -> None:
    prompt = torch.stack(tokens(7, 7))
    made = [
        model.generate(prompt, max_new_tokens=10, min_new_tokens=10, do_sample=False, **how)  # pyright: ignore
        for how in ({"use_cache": True}, {"use_cache": False})
    ]
    assert torch.equal(*made)
    with torch.no_grad():
        cache = model(prompt, use_cache=True).past_key_values
    elements = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    predicted = done("eval", run, "--json").json["size"]["kv_bytes_per_token"]
    assert elements * 4 == predicted["compressed"] * prompt.numel()  # the checkpoint is float32
    assert predicted["compressed"] < predicted["dense"]


@pytest.mark.parametrize("name", ["qwen3-lm", "gemma3_text-lm"])
def test_head_norms_are_refused_by_name_or_left_to_a_linear_method(name: str, tmp_path: Path) -> None:
    model, data = save_redundant(name, tmp_path)
    said = refused("compress", model, "--method", "cr", *data, "--out", tmp_path / "no")
    assert "normalised head by head" in said
    assert "--qk kfac" in said
    run = tmp_path / "run"
    warned = done("compress", model, "--method", "modegpt", *data, "--out", run)
    assert "compresses them by svd-llm here" in warned.text
    matrices = json.loads((run / "model" / "lowrank.json").read_text())["matrices"]
    formats = {entry["format"] for name, entry in matrices.items() if name.endswith(("q_proj", "k_proj"))}
    assert formats <= {"pair", "dense"}
    assert {"width"} <= {entry["format"] for entry in matrices.values()}


@pytest.mark.parametrize("model_type", WHOLE_HEADS)
def test_heads_that_cannot_be_narrower_are_refused_by_name_and_linear_methods_are_not(
    model_type: str, tmp_path: Path
) -> None:
    name = f"{model_type}-lm" if f"{model_type}-lm" in MODELS else f"{model_type}-classification"
    model, data = save_redundant(name, tmp_path)
    said = refused("compress", model, "--method", "modegpt", *data, "--out", tmp_path / "no")
    assert "attention with narrower heads" in said
    assert "--attention kfac" in said
    run = tmp_path / "run"
    done("compress", model, "--attention", "kfac", "--mlp", "nystrom", "--ratio", "0.1", *data, "--out", run)
    check_counts(run, json.loads((run / "model" / "lowrank.json").read_text()))


@pytest.mark.parametrize(("name", "parts"), PARTS, ids=" ".join)
def test_parts_have_methods_of_their_own(name: str, parts: str, tmp_path: Path) -> None:
    model, data = save_redundant(name, tmp_path)
    run = tmp_path / "run"
    done("compress", model, *parts.split(), *data, "--out", run)
    report = json.loads((run / "model" / "lowrank.json").read_text())
    check_counts(run, report)
    found = logits_of(load(run / "model", task(name)))
    exported = tmp_path / "exported"
    done("export", run, "--dense", exported)
    torch.testing.assert_close(
        logits_of(load(exported, task(name))), found, rtol=0, atol=1e-5 * float(found.abs().max())
    )
    # The same once more changes nothing, and says so quickly.
    before = {path.name: path.stat().st_mtime_ns for path in (run / "model").iterdir()}
    done("compress", model, *parts.split(), *data, "--out", run)
    assert before == {path.name: path.stat().st_mtime_ns for path in (run / "model").iterdir()}


@pytest.mark.parametrize(("name", "entry"), [("smollm3", "SMOLLM3"), ("olmo2", "OLMO2")])
def test_families_of_plug_ins(name: str, entry: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers without rotary positions, and norms over all heads together, as the entry says."""
    register(monkeypatch, entry)
    model, data = write_redundant(family(name), "lm", tmp_path)
    own = ["--qk", "dense", "--ratio", "0.12"] if name in HEAD_NORMS else ["--ratio", "0.2"]
    run = tmp_path / "run"
    done("compress", model, "--method", "modegpt", "--allocate", "uniform", *own, *data, "--out", run)
    report = json.loads((run / "model" / "lowrank.json").read_text())
    assert all(entry["rank"] is not None for entry in report["matrices"].values())
    small = load(run / "model", "lm")
    expected, found = logits_of(load(model, "lm")), logits_of(small)
    assert (found - expected).abs().max() <= 2e-4 * (expected - expected.mean()).abs().max()
    done("export", run, "--dense", tmp_path / "exported")
    exported = logits_of(load(tmp_path / "exported", "lm"))
    torch.testing.assert_close(exported, found, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert_cache_shrinks_and_does_not_matter(small, run, report)


@pytest.mark.slow
def test_a_family_whose_entry_says_too_little_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, "PLAIN_SMOLLM3")
    model, data = write_redundant(family("smollm3"), "lm", tmp_path)
    message = refused("compress", model, "--method", "modegpt", *data, "--out", tmp_path / "run")
    assert "model.layers.1.self_attn of SmolLM3ForCausalLM computes something else" in message
    assert "--attention kfac" in message
    done("compress", model, "--attention", "kfac", *data, "--out", tmp_path / "linear")
