"""Attention with a query/key width and a value width of its own, in every family."""

from __future__ import annotations

import copy
import json
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DynamicCache,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from lowrank_compress.arch.resolve import resolve
from lowrank_compress.arch.targets import Resolved, Target
from lowrank_compress.model import weights
from lowrank_compress.model.checkpoint import Checkpoint
from lowrank_compress.model.dense import write_dense
from lowrank_compress.shipped.attention import CompressedAttention
from lowrank_compress.shipped.config import LowRankConfig
from lowrank_compress.shipped.linear import CompressedLinear
from lowrank_compress.shipped.restore import restore_modules
from lowrank_compress.shipped.saving import remote_code_entries, write_remote_code
from lowrank_compress.shipped.swap import swap_modules
from tests.families import family, register
from tests.shipped.test_loading import ROOT, python
from tests.tiny import MODELS, NARROWED, tiny_model, tiny_tokenizer

torch.set_num_threads(1)
pytestmark = pytest.mark.versions

FAMILIES = {name: case for name, case in NARROWED.items() if name.endswith(("-lm", "distilbert-classification"))}
IDS = torch.tensor([[5, 9, 2, 30, 41, 7, 3, 12, 33, 8, 51, 17], [11, 4, 8, 8, 60, 23, 90, 5, 6, 71, 14, 9]])


def one(case: str, **overrides: Any) -> PreTrainedModel:
    model_type, task, variant = MODELS[case]
    return tiny_model(model_type, task, dtype=torch.float64, **variant, **overrides)


def pairs(size: int, rotary: int, generator: torch.Generator) -> Tensor:
    """The dimensions of a head in random order of pairs: first members, then partners."""
    half = rotary // 2
    rest = rotary + torch.randperm(size - rotary, generator=generator)
    first = torch.cat([torch.arange(half), rest[::2]])
    second = torch.cat([torch.arange(half, rotary), rest[1::2]])
    order = torch.randperm(len(first), generator=generator)
    return torch.stack([first[order], second[order]])


def parameters(model: nn.Module, target: Target) -> tuple[Tensor, Tensor | None]:
    """Weight (out, in) and bias (out,) of a target, sharing memory with the model."""
    module: Any = model.get_submodule(target.module)
    bias = weights.bias(module.bias.data, target) if module.bias is not None else None
    return weights.read(module.weight.data, target), bias


def put(model: nn.Module, target: Target, weight: Tensor, bias: Tensor | None) -> None:
    module: Any = model.get_submodule(target.module)
    weights.place(module.weight.data, target, weight)
    if bias is not None:
        weights.place_bias(module.bias.data, target, bias)


def narrowed(
    model: PreTrainedModel,
    keep: float = 1.0,
    factorized: str = "",
    seed: int = 0,
    traits: dict[str, Any] | None = None,
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A model whose attention keeps part of each head, and the stock model that it must equal.

    Queries and keys are first put in another basis (pairs in another order if rotated), values and outputs too. The
    stock model then has zeros where the narrow one has nothing. Roles in `factorized` are stored as factors. The
    entries say `traits`; if that is None, those of the architecture.
    """
    generator = torch.Generator().manual_seed(seed)
    resolved: Resolved = resolve(model)
    heads, norms = resolved.heads, resolved.architecture.head_norms
    group = heads.query // heads.key
    wide = heads.size if norms else max(2, int(keep * heads.size) // 2 * 2)
    narrow = max(1, int(keep * heads.size) - (keep < 1))
    rotary = heads.rotary > 0 and not norms
    stock = copy.deepcopy(model)
    config: dict[str, Any] = {"modules": {}, "dense_shapes": {}, "attention": {}}
    tensors: dict[str, Tensor] = {}
    for i, prefix in enumerate(resolved.blocks):
        targets = {target.role: target for target in resolved.of_block(i)}
        kept = torch.arange(wide).expand(heads.key, -1)
        basis = torch.eye(heads.size).expand(heads.key, -1, -1).double()
        if rotary:
            chosen = [pairs(heads.size, heads.rotary, generator)[:, : wide // 2] for _ in range(heads.key)]
            kept = torch.stack([pair.flatten() for pair in chosen])
        elif not norms:
            noise = torch.randn(heads.key, heads.size, heads.size, generator=generator, dtype=torch.float64)
            basis = torch.linalg.qr(noise).Q
        mix = torch.randn(heads.key, heads.size, heads.size, generator=generator, dtype=torch.float64)
        mix = mix + 3 * torch.eye(heads.size)
        small: dict[str, tuple[Tensor, Tensor | None]] = {}
        for role in ("q", "k", "v"):
            weight, bias = parameters(stock, targets[role])
            turn = (mix if role == "v" else basis).repeat_interleave(group if role == "q" else 1, 0)
            rows = torch.arange(narrow).expand(heads.key, -1) if role == "v" else kept
            rows = rows.repeat_interleave(group if role == "q" else 1, 0)
            mask = torch.zeros(len(turn), heads.size).scatter(1, rows, 1.0).double()
            done = []
            for value in (weight, bias):
                if value is None:
                    done.append((None, None))
                    continue
                turned = (turn @ value.view(len(turn), heads.size, -1)) * mask[..., None]
                part = turned.gather(1, rows[..., None].expand(-1, -1, turned.shape[2]))
                done.append((turned.reshape(value.shape), part.reshape(-1, *value.shape[1:])))
            put(stock, targets[role], done[0][0], done[1][0])
            small[role] = (done[0][1], done[1][1])
        weight, bias = parameters(stock, targets["o"])
        back = torch.linalg.inv(mix).repeat_interleave(group, 0)
        turned = torch.einsum("ahi,hij->ahj", weight.view(len(weight), heads.query, -1), back)
        turned[..., narrow:] = 0
        put(stock, targets["o"], turned.flatten(1), None)
        small["o"] = (turned[..., :narrow].flatten(1), bias)

        attention = f"{prefix}.{resolved.architecture.attention}"
        config["attention"][attention] = {
            "heads": heads.query,
            "kv_heads": heads.key,
            "size": heads.size,
            "query_key": wide,
            "value": narrow,
            "rotary": rotary,
            "interleaved": targets["q"].view.rows.groups > 1,
            "projections": {role: targets[role].module for role in ("q", "k", "v", "o")},
        }
        if said := resolved.architecture.traits.entry() if traits is None else traits:
            config["attention"][attention]["traits"] = said
        if rotary:
            tensors[f"{attention}.lr_rotary"] = kept
        by_module: dict[str, list[str]] = {}
        for role in ("q", "k", "v", "o"):
            by_module.setdefault(targets[role].module, []).append(role)
        for path, roles in by_module.items():
            groups = targets[roles[0]].view.rows.groups
            whole = torch.cat([small[role][0].unflatten(0, (groups, -1)) for role in roles], 1).flatten(0, 1)
            biases = [small[role][1] for role in roles]
            rows, columns = whole.shape
            if (rows, columns) != (targets[roles[0]].view.rows.total, targets[roles[0]].shape[1]):
                config["dense_shapes"][path] = [rows, columns]
            if set(roles) & set(factorized):
                forms = ["pair" if role in factorized else "dense" for role in roles]
                sizes = [len(small[role][0]) for role in roles]
                ranks = [min(columns, m) if form == "pair" else m for form, m in zip(forms, sizes, strict=True)]
                config["modules"][path] = {
                    "in_features": columns,
                    "out_features": rows,
                    "bias": biases[0] is not None,
                    "heads": groups,
                    "parts": [
                        {"rows": m, "format": form, "rank": r} for m, form, r in zip(sizes, forms, ranks, strict=True)
                    ],
                }
                inner = []
                for j, role in enumerate(roles):
                    u, s, vh = torch.linalg.svd(small[role][0], full_matrices=False)
                    inner.append(s[:, None] * vh if forms[j] == "pair" else small[role][0])
                    if forms[j] == "pair":
                        tensors[f"{path}.lr_out{'' if len(roles) == 1 else f'_{j}'}.weight"] = u
                tensors[f"{path}.lr_in.weight"] = torch.cat(inner)
                tensors[f"{path}.weight"] = torch.empty(0, dtype=torch.float64)
            else:
                tensors[f"{path}.weight"] = whole.T if targets[roles[0]].view.transposed else whole
            if biases[0] is not None:
                joined = [bias.unflatten(0, (groups, -1)) for bias in biases if bias is not None]
                tensors[f"{path}.bias"] = torch.cat(joined, 1).flatten()
    small_model = copy.deepcopy(model)
    low_rank = LowRankConfig(**config)
    swap_modules(small_model, low_rank)
    small_model.load_state_dict({**stock.state_dict(), **tensors})
    small_model.config.quantization_config = low_rank
    return small_model, stock


def save(model: PreTrainedModel, directory: Path) -> Path:
    model.config.auto_map = remote_code_entries(model.config)
    model.save_pretrained(directory)
    write_remote_code(directory)
    return directory


def auto(model: PreTrainedModel) -> Any:
    named = type(model).__name__
    return AutoModelForSequenceClassification if "Classification" in named else AutoModelForCausalLM


def logits(model: Any, **options: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, **options).logits


def compressed(model: nn.Module) -> list[CompressedAttention]:
    return [module for module in model.modules() if isinstance(module, CompressedAttention)]


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    # OPT's eager attention makes NaN of a padding token that sees nothing.
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("case", NARROWED)
def test_full_width_in_another_order_computes_what_the_dense_model_does(case: str) -> None:
    model = one(case)
    small, _ = narrowed(model)
    assert compressed(small)
    close(logits(small), logits(model))


@pytest.mark.parametrize("case", NARROWED)
def test_narrow_heads_equal_stock_heads_with_zeros(case: str) -> None:
    small, stock = narrowed(one(case), 0.7)
    expected = logits(stock)
    assert not torch.allclose(expected, logits(one(case)), rtol=1e-3)
    close(logits(small), expected)
    mask = torch.ones_like(IDS)
    mask[0, :4] = 0
    for implementation in ("eager", "sdpa"):
        if implementation == "sdpa" and getattr(small.config, "attn_logit_softcapping", None):
            continue  # unknown to it
        for model in (small, stock):
            model.set_attn_implementation(implementation)
        # Most families' eager softmax is a float32 one.
        tolerance = 1e-5 if implementation == "eager" else 1e-10
        close(logits(small), expected, tolerance)
        close(logits(small, attention_mask=mask), logits(stock, attention_mask=mask), tolerance)
    for model in (small, stock):
        model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = [model(input_ids=IDS, output_attentions=True).attentions for model in (small, stock)]
    assert len(attentions[0]) == len(compressed(small))
    for found, exact in zip(*attentions, strict=True):
        close(found, exact, 1e-5)


@pytest.mark.parametrize(("name", "entry"), [("smollm3", "SMOLLM3"), ("olmo2", "OLMO2")])
def test_what_further_families_declare(name: str, entry: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers without rotary positions; norms over all heads together. With the caches, loaded, and restored."""
    register(monkeypatch, entry)
    full, _ = narrowed(family(name, torch.float64))
    close(logits(full), logits(family(name, torch.float64)))
    small, stock = narrowed(family(name, torch.float64), 0.7, "v")
    expected = logits(stock)
    assert not torch.allclose(expected, logits(full), rtol=1e-3)
    close(logits(small), expected)
    loaded = AutoModelForCausalLM.from_pretrained(save(small, tmp_path))
    assert {module.lr_heads.traits for module in compressed(loaded)} == {resolve(stock).architecture.traits}
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["version"] == 3
    close(logits(loaded), expected)
    options: dict[str, Any] = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    assert torch.equal(loaded.generate(IDS, **options), stock.generate(IDS, use_cache=False, **options))
    restore_modules(loaded)
    close(logits(loaded), expected)


@pytest.mark.parametrize("case", [case for case in NARROWED if case not in ("olmo2-lm", "smollm3-lm")])
def test_entries_that_do_not_say_traits_are_computed_as_the_table_declares(case: str) -> None:
    """As they were before version 3."""
    small, _ = narrowed(one(case), 0.7)
    silent, _ = narrowed(one(case), 0.7, traits={})
    assert silent.config.quantization_config.version == 2
    assert all("traits" not in entry for entry in silent.config.quantization_config.attention.values())
    assert [module.lr_heads.traits for module in compressed(silent)] == [
        module.lr_heads.traits for module in compressed(small)
    ]
    assert torch.equal(logits(silent), logits(small))


@pytest.mark.parametrize(
    ("traits", "message"),
    [
        ({"output_dropout": "scaling"}, "a LlamaAttention has no module scaling, which is to be its output_dropout"),
        ({"rotates": "use_rope"}, "a LlamaAttention has no use_rope, which is to be its rotates"),
        ({"window": "config.window"}, "a LlamaAttention has no config.window, which is to be its window"),
    ],
)
def test_traits_that_the_module_does_not_have(traits: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        narrowed(one("llama-lm"), 0.7, traits=traits)
    with pytest.raises(ValueError, match="a Qwen3Attention has no module norm_q, which is to be its query_norm"):
        narrowed(one("qwen3-lm"), 0.7, traits={"query_norm": "norm_q", "key_norm": "k_norm"})


@pytest.mark.parametrize("case", FAMILIES)
@pytest.mark.parametrize("factorized", ["", "vo"])
def test_restored_model_is_the_stock_one(case: str, factorized: str) -> None:
    small, stock = narrowed(one(case), 0.7, factorized)
    close(logits(small), logits(stock))
    restored = restore_modules(small)
    assert restored
    assert {name: type(module) for name, module in small.named_modules()} == {
        name: type(module) for name, module in stock.named_modules()
    }
    state = small.state_dict()
    assert list(state) == list(stock.state_dict())
    assert {name: value.shape for name, value in state.items()} == {
        name: value.shape for name, value in stock.state_dict().items()
    }
    for name, value in stock.state_dict().items():
        close(state[name], value, 1e-13)
    assert not any(hasattr(module, "lr_heads") or hasattr(module, "lr_rotary") for module in small.modules())
    close(logits(small), logits(stock))


@pytest.mark.parametrize("factorized", ["v", "o", "qk"])
@pytest.mark.parametrize("case", ["llama-lm", "gpt2-lm", "gpt_neox-lm", "phi3-lm", "bert-classification"])
def test_factors_inside(case: str, factorized: str) -> None:
    small, stock = narrowed(one(case), 0.7, factorized)
    assert any(isinstance(module, CompressedLinear) for module in small.modules())
    close(logits(small), logits(stock))
    restore_modules(small)
    close(logits(small), logits(stock))


@pytest.mark.parametrize("case", [name for name in FAMILIES if FAMILIES[name][1] == "lm"])
def test_generate_with_every_cache(case: str) -> None:
    small, stock = narrowed(one(case), 0.7)
    del small.config.quantization_config
    options: dict[str, Any] = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    mask = torch.ones_like(IDS)
    mask[0, :3] = 0
    expected = stock.generate(IDS, attention_mask=mask, use_cache=False, **options)
    caches: list[dict[str, Any]] = [{"use_cache": False}, {}]
    if small._can_compile_fullgraph:
        caches.append({"cache_implementation": "static", "disable_compile": True})
    for cache in caches:
        assert torch.equal(small.generate(IDS, attention_mask=mask, **options, **cache), expected), cache
    layers = small(input_ids=IDS, use_cache=True).past_key_values
    layers = getattr(layers, "self_attention_cache", layers).layers
    for layer, attention in zip(layers, compressed(small), strict=True):
        heads = attention.lr_heads
        assert layer.keys.shape[1:2] + layer.keys.shape[3:] == (heads.kv_heads, heads.query_key)
        assert layer.values.shape[1:2] + layer.values.shape[3:] == (heads.kv_heads, heads.value)
        assert heads.value < heads.size


@pytest.mark.parametrize("case", FAMILIES)
def test_save_and_load(case: str, tmp_path: Path) -> None:
    small, stock = narrowed(one(case), 0.7, "v")
    save(small, tmp_path / "small")
    loaded, info = auto(small).from_pretrained(tmp_path / "small", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    state = loaded.state_dict()
    for name, value in small.state_dict().items():
        assert torch.equal(state[name], value), name
    # A gemma in float64 multiplies its embeddings by another number if it was made in float32.
    close(logits(loaded), logits(small), 1e-5 if "gemma" in case else 0.0)
    loaded.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    first = load_file(tmp_path / "small" / "model.safetensors")
    assert again.keys() == first.keys()
    assert all(torch.equal(again[name], value) for name, value in first.items())
    base = AutoModel.from_pretrained(tmp_path / "small")
    assert len(compressed(base)) == len(compressed(small))

    tiny_tokenizer(tmp_path / "small")
    write_dense(Checkpoint(tmp_path / "small"), tmp_path / "dense")
    dense, info = auto(small).from_pretrained(tmp_path / "dense", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for name, value in stock.state_dict().items():
        close(dense.state_dict()[name], value, 1e-13)
    exact = logits(loaded)
    close(logits(dense), exact, 1e-6)
    assert type(loaded.dequantize()) is type(stock)
    close(logits(loaded), exact, 1e-6)
    assert not compressed(loaded)


WITHOUT_PACKAGE = """
    import json, sys, torch
    sys.modules["lowrank_compress"] = None
    torch.set_num_threads(1)
    import transformers
    ids = torch.tensor(json.loads(sys.argv[2]))
    places = json.loads(sys.argv[1])
    for auto, directory in places:
        try:
            getattr(transformers, auto).from_pretrained(directory)
        except RuntimeError as error:
            assert "mismatch" in str(error), error
        else:
            raise AssertionError(f"{directory} was loaded by code that does not know it")
    for auto, directory in places:
        model = getattr(transformers, auto).from_pretrained(directory, trust_remote_code=True)
        model.save_pretrained(directory + "-again")
        with torch.no_grad():
            torch.save(model(input_ids=ids).logits, directory + "-logits.pt")
"""


@pytest.mark.slow
def test_remote_code_and_loud_failure_without_it(tmp_path: Path) -> None:
    places, models = [], []
    for case in ("llama-lm", "gpt2-lm"):
        small, _ = narrowed(one(case), 0.7)
        places.append((auto(small).__name__, str(save(small, tmp_path / case))))
        models.append(small)
    (tmp_path / "cache").mkdir()
    python(WITHOUT_PACKAGE, json.dumps(places), json.dumps(IDS.tolist()), ROOT, cache=tmp_path / "cache")
    for (_, directory), small in zip(places, models, strict=True):
        expected = torch.load(f"{directory}-logits.pt")
        assert torch.equal(logits(auto(small).from_pretrained(directory)), expected)
        assert torch.equal(logits(auto(small).from_pretrained(f"{directory}-again")), expected)
        close(logits(small), expected)


@pytest.mark.parametrize("case", ["llama-lm", "gpt2-lm", "gpt_neox-lm", "bert-classification"])
def test_gradients_copies_and_half_precision(case: str) -> None:
    small, _ = narrowed(one(case), 0.7)
    expected = logits(small)
    for twin in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        assert len(compressed(twin)) == len(compressed(small))
        assert torch.equal(logits(twin), expected)
        twin.bfloat16()
        assert all(module.lr_rotary.dtype == torch.int32 for module in compressed(twin) if module.lr_heads.rotary)
        torch.testing.assert_close(logits(twin).double(), expected, rtol=0.2, atol=0.2)
    gradients = []
    for checkpointing in (False, True):
        # Dropout stays off: a block decides to checkpoint by the model's mode, everything else by its own.
        small.train()
        for module in small.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        small.zero_grad()
        if checkpointing:
            small.gradient_checkpointing_enable()
        for attention in compressed(small):
            for name in ("attention_dropout", "dropout"):
                if isinstance(getattr(attention, name, None), float):
                    setattr(attention, name, 0.0)
        small(input_ids=IDS).logits.square().sum().backward()
        gradients.append({n: p.grad for n, p in small.named_parameters() if p.grad is not None})
    inside = [n for n in gradients[0] if any(role in n for role in ("q_proj", "v_proj", "c_attn", "query", "value"))]
    assert inside
    assert all(gradients[0][n].abs().sum() > 0 for n in inside)
    for name, gradient in gradients[0].items():
        close(gradients[1][name], gradient)


def test_compiles_to_one_graph() -> None:
    torch._dynamo.reset()
    small, _ = narrowed(one("phi3-lm"), 0.7)
    compiled = torch.compile(small, fullgraph=True, backend="eager")
    with torch.no_grad():
        close(compiled(input_ids=IDS, use_cache=False).logits, logits(small))


def test_flex_attention() -> None:
    small, stock = (model.float() for model in narrowed(one("llama-lm"), 0.7))
    expected = logits(stock)
    small.set_attn_implementation("flex_attention")
    with torch.compiler.set_stance("force_eager"):  # compiling takes long
        found = logits(small)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_lora(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    small, _ = narrowed(one("llama-lm"), 0.7)
    loaded = AutoModelForCausalLM.from_pretrained(save(small, tmp_path))
    before = logits(loaded)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(loaded, config)
    changed = logits(adapted)
    assert not torch.allclose(changed, before)
    adapted(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for n, p in adapted.named_parameters() if "lora_" in n)
    close(logits(adapted.merge_and_unload()), changed, 1e-5)


def test_cross_attention_is_refused() -> None:
    small, _ = narrowed(one("bert-classification"), 0.7)
    with pytest.raises(ValueError, match="attends to its own sequence only"):
        compressed(small)[0](torch.zeros(1, 2, 32).double(), encoder_hidden_states=torch.zeros(1, 2, 32).double())


def entry(**changes: Any) -> dict[str, Any]:
    path = "model.layers.0.self_attn"
    return {
        "heads": 4,
        "kv_heads": 2,
        "size": 8,
        "query_key": 8,
        "value": 8,
        "rotary": True,
        "interleaved": False,
        "projections": {role: f"{path}.{role}_proj" for role in "qkvo"},
    } | changes


def places(**changes: str) -> dict[str, str]:
    return {role: f"model.layers.0.self_attn.{role}_proj" for role in "qkvo"} | changes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"traits": ["rotates"]}, "expected traits by name, got"),
        ({"traits": {"turns": "s"}}, "unknown traits turns, expected some of query_norm, key_norm, "),
        ({"traits": {"rotates": True}}, "its trait rotates cannot be True"),
        ({"traits": {"query_norm": "q_norm"}}, "its trait key_norm cannot be None"),
        ({"sparse": 1}, r"attention\['model.layers.0.self_attn'\]: expected the keys"),
        ({"heads": 3}, "3 query heads cannot share 2 key-value heads"),
        ({"query_key": 10}, "query_key is from 1 to 8, the size of a stock head, got 10"),
        ({"value": 0}, "value is from 1 to 8, the size of a stock head, got 0"),
        ({"query_key": 5}, "turn pairs of dimensions; query_key is 5"),
        ({"interleaved": True}, "only a fused weight with as many key-value heads"),
        ({"projections": {"q": "a"}}, "expected the projections q, k, v and o"),
        ({"projections": places(q="model.layers.0.self_attn.k_proj")}, "must have one path each, or the same"),
        ({"projections": places(q="model.q_proj")}, "expected it to be a child of model.layers.0.self_attn"),
        ({"projections": places(o="model.layers.0.self_attn.out.o_proj")}, "a child of .* or outside of it"),
    ],
)
def test_config_with_a_bad_attention(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LowRankConfig(attention={"model.layers.0.self_attn": entry(**change)})


@pytest.mark.parametrize(
    ("case", "change", "message"),
    [
        ("llama-lm", {"query_key": 6}, "q_proj has 32 rows, stock 32; the heads in the low-rank config need 24"),
        ("llama-lm", {"value": 5}, "v_proj has 16 rows, stock 16; the heads in the low-rank config need 10"),
        ("llama-lm", {"heads": 2}, "shares a key-value head among 2 heads"),
        ("llama-lm", {"query_key": 6, "rotary": False}, "rotated and smaller need rotary indices"),
        ("qwen3-lm", {"size": 16}, "norms of their own must keep their heads"),
        ("opt-lm", {}, "has no rotary embedding"),
    ],
)
def test_attention_that_does_not_fit(case: str, change: dict[str, Any], message: str) -> None:
    path = "model.decoder.layers.0.self_attn" if case == "opt-lm" else "model.layers.0.self_attn"
    changed = entry(**change)
    changed["projections"] = {role: f"{path}.{role}_proj" for role in "qkvo"}
    with pytest.raises(ValueError, match=message):
        swap_modules(one(case), LowRankConfig(attention={path: changed}))


def test_restoring_needs_the_weights() -> None:
    small, _ = narrowed(one("llama-lm"), 0.7)
    with pytest.raises(ValueError, match=r"the weights of .* are not in memory"):
        restore_modules(small.to("meta"))


def test_conv1d_stays_conv1d() -> None:
    small, _ = narrowed(one("gpt2-lm"), 0.7)
    attention: Any = compressed(small)[0]
    assert isinstance(attention.c_attn, Conv1D)
    assert "heads=4, kv_heads=4, query_key=4, value=4" in repr(attention)
    assert type(attention).__name__ == "CompressedGPT2Attention"


@pytest.mark.parametrize("name", ["cache", "past_key_values", "layer_past"])
def test_the_cache_by_every_name(name: str) -> None:
    small, _ = narrowed(one("llama-lm"), 0.7)
    attention = compressed(small)[0]
    given, seen = DynamicCache(), []
    hidden = torch.randn(1, 3, small.config.hidden_size, dtype=small.dtype)
    tables = torch.ones(1, 3, small.config.head_dim, dtype=small.dtype)
    for part in hidden.split([2, 1], 1):
        seen.append(attention(part, position_embeddings=(tables[:, : part.shape[1]],) * 2, **{name: given})[0])
    assert given.get_seq_length() == 3
    alone = attention(hidden[:, 2:], position_embeddings=(tables[:, :1],) * 2)[0]
    assert not torch.allclose(seen[1], alone)


def test_an_unknown_argument_is_an_error() -> None:
    small, _ = narrowed(one("llama-lm"), 0.7)
    small(IDS, kv_store=None, use_cache=False, output_hidden_states=True)
    with pytest.raises(TypeError, match="got head_mask, kv_store, which compressed attention does not take"):
        small(IDS, kv_store=object(), head_mask=torch.ones(4))


@pytest.mark.parametrize("case", FAMILIES)
def test_the_attention_function_gets_what_the_stock_module_passes_on(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names and values, those that callers give included."""
    seen: list[dict[str, Any]] = []

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, temperature: float = 1, **given: Any):
        seen.append({**given, "mask": mask, "temperature": temperature})
        return torch.zeros(*query.transpose(1, 2).shape[:3], value.shape[-1], dtype=value.dtype), None

    lengths = torch.tensor([0, 12, 24])
    options = {"cu_seq_lens_q": lengths, "cu_seq_lens_k": lengths, "max_length_q": 12, "max_length_k": 12}
    options |= {"num_items_in_batch": torch.tensor(2), "temperature": 0.5, "kernel_options": {"BLOCK_M": 16}}
    mask = torch.ones_like(IDS)
    mask[0, :4] = 0
    calls = []
    for model in narrowed(one(case), 0.7):
        monkeypatch.setattr(sys.modules[type(model).__module__], "eager_attention_forward", attend)
        model.set_attn_implementation("eager")
        seen.clear()
        logits(model, attention_mask=mask, **options)
        # OPT scales its queries beforehand; some families do not pass on what changes nothing in an attention.
        other = ("scaling", "use_cache", "output_attentions")
        calls.append(
            [{name: value for name, value in call.items() if name not in other and value is not None} for call in seen]
        )
    assert calls[0]
    # Blocks of StableLM keep what they are given for themselves.
    assert calls[0][0]["temperature"] == (1 if case == "stablelm-lm" else 0.5)
    for ours, stock in zip(*calls, strict=True):
        assert ours.keys() == stock.keys()
        for name, value in stock.items():
            assert torch.equal(ours[name], value) if isinstance(value, Tensor) else ours[name] == value, name


def test_a_cache_is_told_where_the_tokens_belong() -> None:
    """As transformers 4 does; its static cache would put every token in the first place."""
    small, _ = narrowed(one("llama-lm"), 0.7)
    given = []

    class Cache:
        def update(self, key: Tensor, value: Tensor, layer: int, *places: Any) -> tuple[Tensor, Tensor]:
            given.append(places)
            return key, value

    hidden = torch.randn(1, 2, small.config.hidden_size, dtype=small.dtype)
    tables = torch.ones(1, 2, small.config.head_dim, dtype=small.dtype)
    for place in (None, torch.tensor([5, 6])):
        compressed(small)[0](hidden, position_embeddings=(tables, tables), cache=Cache(), cache_position=place)
    assert given == [(), ({"cache_position": place},)]


def test_an_attention_of_the_first_version_loads_bit_for_bit(tmp_path: Path) -> None:
    small, _ = narrowed(one("llama-lm"), 0.7)
    save(small, tmp_path)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert {module.lr_rotary.dtype for module in compressed(expected)} == {torch.int32}
    tensors = load_file(tmp_path / "model.safetensors")
    wider = {name: value.long() if "lr_rotary" in name else value for name, value in tensors.items()}
    save_file(wider, tmp_path / "model.safetensors", {"format": "pt"})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert {module.lr_rotary.dtype for module in compressed(loaded)} == {torch.int32}
    assert torch.equal(logits(loaded), logits(expected))
    for attention in compressed(loaded):
        attention.lr_rotary = attention.lr_rotary.long()
    assert torch.equal(logits(loaded), logits(expected))
    assert torch.equal(logits(loaded.dequantize()), logits(expected.dequantize()))
