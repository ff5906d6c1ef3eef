from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig

from lowrank_compress.errors import CheckpointError, UnsupportedError
from lowrank_compress.evaluation.replayed import walked
from lowrank_compress.model.blueprint import blueprint
from lowrank_compress.model.checkpoint import Checkpoint
from lowrank_compress.model.skeleton import Skeleton
from lowrank_compress.model.tasks import task_of
from lowrank_compress.model.walk.batch import Batch
from tests.ordinary import Saved, load, task, tokens
from tests.tiny import MODELS, tiny_model

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return Saved(tmp_path_factory.mktemp("models"))


def whole(skeleton: Skeleton) -> dict[str, Tensor]:
    """Every parameter and buffer, block by block."""
    state: dict[str, Tensor] = {}
    for index, prefix in enumerate(skeleton.resolved.blocks):
        with skeleton.block(index) as block:
            for name, tensor in [*block.named_parameters(), *block.named_buffers()]:
                state[f"{prefix}.{name}"] = tensor.clone()
    outside = [*skeleton.model.named_parameters(remove_duplicate=False), *skeleton.model.named_buffers()]
    return {name: tensor for name, tensor in outside if not tensor.is_meta} | state


def logits_of(skeleton: Skeleton) -> Tensor:
    batch = Batch(torch.stack(tokens(11, 11)))
    (walk,) = walked(skeleton, [batch])
    with torch.no_grad():
        return walk.head(0, walk.leaving(0))


def assert_loads(path: Path, like: Path, case: str) -> None:
    """Every tensor of a checkpoint that is stored otherwise is that of the stock model, and so are the logits."""
    stock = load(like, task(case))
    skeleton = Skeleton(Checkpoint(path), CPU, torch.float64)
    state = whole(skeleton)
    for name, tensor in [*stock.named_parameters(remove_duplicate=False), *stock.named_buffers()]:
        assert torch.equal(state.pop(name), tensor), name
    assert state == {}
    with torch.no_grad():
        expected = stock(input_ids=torch.stack(tokens(11, 11))).logits
    assert (logits_of(skeleton) - expected).abs().max() <= 1e-12 * expected.abs().max()


def rewritten(source: Path, place: Path, change: Any, config: dict[str, Any] | None = None) -> Path:
    """Copy a checkpoint with other tensors."""
    settings = json.loads((source / "config.json").read_text()) | (config or {})
    (place / "config.json").write_text(json.dumps(settings))
    save_file(change(load_file(source / "model.safetensors")), place / "model.safetensors", {"format": "pt"})
    return place


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", MODELS)
def test_holds_what_from_pretrained_loads(case: str, stored: torch.dtype, saved: Saved) -> None:
    """Buffers that no file holds included: rotary frequencies, position ids, the scale of Gemma's embeddings."""
    path = saved(case, stored)
    stock = load(path, task(case), torch.float32)
    state = whole(Skeleton(Checkpoint(path), CPU, torch.float32))
    for name, tensor in [*stock.named_parameters(remove_duplicate=False), *stock.named_buffers()]:
        found = state.pop(name)
        assert found.dtype == tensor.dtype, name
        assert torch.equal(found, tensor), name
    assert state == {}


@pytest.mark.parametrize("case", MODELS)
def test_nothing_learns_and_nothing_drops_out(case: str, saved: Saved) -> None:
    skeleton = Skeleton(Checkpoint(saved(case)), CPU, torch.float32)
    with skeleton.block(0) as block:
        assert not any(parameter.requires_grad for parameter in skeleton.model.parameters())
        assert not any(module.training for module in [*skeleton.model.modules(), *block.modules()])


def test_tied_heads_share_memory(saved: Saved) -> None:
    model: Any = Skeleton(Checkpoint(saved("llama-tied")), CPU, torch.float32).model
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    model = Skeleton(Checkpoint(saved("llama-lm")), CPU, torch.float32).model
    assert model.lm_head.weight.data_ptr() != model.model.embed_tokens.weight.data_ptr()


def test_the_block_that_follows_is_read_ahead(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    skeleton = Skeleton(Checkpoint(saved("llama-tied")), torch.device("cpu"), torch.float32)
    asked: list[set[str]] = []
    monkeypatch.setattr(Checkpoint, "read_ahead", lambda _, names: asked.append(set(names)))
    for index, then in ((0, 1), (0, -1), (1, 2), (1, None)):
        with skeleton.block(index, then=then):
            pass
    assert asked == [{name for name in skeleton.blueprint.stored.values() if ".layers.1." in name}]


def test_a_block_leaves_memory_after_an_error(saved: Saved) -> None:
    skeleton = Skeleton(Checkpoint(saved("llama-lm")), CPU, torch.float32)
    with pytest.raises(KeyboardInterrupt), skeleton.block(1):
        raise KeyboardInterrupt
    assert all(parameter.is_meta for block in skeleton.blocks for parameter in block.parameters())


# --- How checkpoints are stored


@pytest.mark.parametrize(
    ("case", "prefix"), [("gpt2-lm", "transformer."), ("llama-lm", "model."), ("bert-classification", "bert.")]
)
def test_names_without_the_prefix_of_the_base_model(case: str, prefix: str, saved: Saved, tmp_path: Path) -> None:
    def bare(state: dict[str, Tensor]) -> dict[str, Tensor]:
        assert any(name.startswith(prefix) for name in state)
        extra = {"h.0.attn.bias": torch.ones(1)} if case == "gpt2-lm" else {}
        return {name.removeprefix(prefix): value for name, value in state.items()} | extra

    assert_loads(rewritten(saved(case), tmp_path, bare), saved(case), case)


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("case", ["bert-lm", "bert-classification", "roberta-classification"])
def test_norms_of_old_checkpoints(case: str, bare: bool, saved: Saved, tmp_path: Path) -> None:
    def old(state: dict[str, Tensor]) -> dict[str, Tensor]:
        names = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
        renamed = {re.sub("LayerNorm.(weight|bias)", lambda m: names[m[0]], name): t for name, t in state.items()}
        assert sum("gamma" in name for name in renamed) > 4
        base = case.partition("-")[0] + "."
        return {name.removeprefix(base) if bare else name: tensor for name, tensor in renamed.items()}

    assert_loads(rewritten(saved(case), tmp_path, old), saved(case), case)


@pytest.mark.parametrize("name", ["embed_out.weight", "lm_head.weight"])
def test_both_names_of_the_head_of_gpt_neox(name: str, saved: Saved, tmp_path: Path) -> None:
    def named(state: dict[str, Tensor]) -> dict[str, Tensor]:
        head = state.pop("embed_out.weight")
        return state | {name: head}

    assert_loads(rewritten(saved("gpt_neox-lm"), tmp_path, named), saved("gpt_neox-lm"), "gpt_neox-lm")


@pytest.mark.parametrize("case", ["gemma2-lm", "gpt2-lm", "bert-classification"])
def test_shards(case: str, saved: Saved, tmp_path: Path) -> None:
    model_type, kind, overrides = MODELS[case]
    tiny_model(model_type, kind, **overrides).save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    assert_loads(tmp_path, saved(case), case)


@pytest.mark.parametrize("kept", ["both", "embedding", "head"])
@pytest.mark.parametrize(
    ("case", "embedding", "head"),
    [
        ("llama-tied", "model.embed_tokens.weight", "lm_head.weight"),
        ("gpt2-lm", "transformer.wte.weight", "lm_head.weight"),
        ("opt-lm", "model.decoder.embed_tokens.weight", "lm_head.weight"),
        ("bert-lm", "bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"),
    ],
)
def test_whichever_tied_tensor_is_stored(
    case: str, embedding: str, head: str, kept: str, saved: Saved, tmp_path: Path
) -> None:
    def stored(state: dict[str, Tensor]) -> dict[str, Tensor]:
        tensor = state.pop(embedding)
        names = {"both": (embedding, head), "embedding": (embedding,), "head": (head,)}[kept]
        return state | {name: tensor.clone() for name in names}

    assert_loads(rewritten(saved(case), tmp_path, stored), saved(case), case)


def test_tied_tensors_that_differ_are_an_error(saved: Saved, tmp_path: Path) -> None:
    """transformers would silently not tie them, in spite of the config."""

    def differing(state: dict[str, Tensor]) -> dict[str, Tensor]:
        return state | {"lm_head.weight": state["model.embed_tokens.weight"] * 2}

    path = rewritten(saved("llama-tied"), tmp_path, differing)
    message = "stores different values in model.embed_tokens.weight and lm_head.weight"
    with pytest.raises(CheckpointError, match=message):
        Skeleton(Checkpoint(path), CPU, torch.float32)


# --- What is wrong with a checkpoint

OUTSIDE = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
INSIDE = ["model.layers.1.self_attn.k_proj.weight", "model.layers.1.input_layernorm.weight"]


@pytest.mark.parametrize("name", OUTSIDE + INSIDE)
def test_a_missing_tensor_is_named(name: str, saved: Saved, tmp_path: Path) -> None:
    path = rewritten(saved("llama-lm"), tmp_path, lambda state: {key: state[key] for key in state if key != name})
    with pytest.raises(CheckpointError, match=rf"has no tensor {re.escape(name)}, which its config asks for"):
        logits_of(Skeleton(Checkpoint(path), CPU, torch.float32))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", OUTSIDE + INSIDE)
def test_a_tensor_that_is_not_finite_is_named(name: str, bad: float, saved: Saved, tmp_path: Path) -> None:
    def spoiled(state: dict[str, Tensor]) -> dict[str, Tensor]:
        state[name].view(-1)[-2:] = bad
        return state

    path = rewritten(saved("llama-lm"), tmp_path, spoiled)
    with pytest.raises(CheckpointError, match=rf"The tensor {re.escape(name)} of .* has 2 NaN or infinite elements"):
        logits_of(Skeleton(Checkpoint(path), CPU, torch.float32))


def test_quantized_weights_are_refused(saved: Saved, tmp_path: Path) -> None:
    settings = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}
    path = rewritten(saved("llama-lm"), tmp_path, dict, settings)
    with pytest.raises(UnsupportedError, match=r"is quantized \(bitsandbytes\); expected plain floating-point weights"):
        Skeleton(Checkpoint(path), CPU, torch.float32)


@pytest.mark.parametrize(
    ("heads", "expected"),
    [
        (["LlamaForCausalLM"], "lm"),
        (["GPT2LMHeadModel"], "lm"),
        (["BertForSequenceClassification"], "classification"),
        (["BertForMaskedLM"], "masked"),
        (["BertForTokenClassification"], "tokens"),
        (["BertForQuestionAnswering"], "answers"),
        (["BertForMultipleChoice"], None),
        (["LlamaModel"], "embedding"),
        ([], None),
        (None, None),
    ],
)
def test_the_head_is_known_by_its_name(heads: list[str] | None, expected: str | None) -> None:
    config = AutoConfig.for_model("llama", architectures=heads, pad_token_id=0)
    if expected is None:
        with pytest.raises(
            UnsupportedError, match=r"The checkpoint's head is .*; supported are causal language models"
        ):
            task_of(config)
    else:
        assert task_of(config) == expected


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"num_labels": 1}, "scores"),
        ({"problem_type": "multi_label_classification"}, "labels"),
        ({"problem_type": "single_label_classification"}, "classification"),
    ],
)
def test_classifiers_that_cross_entropy_does_not_fit(options: dict[str, Any], expected: str) -> None:
    head = {"architectures": ["LlamaForSequenceClassification"], "pad_token_id": 0}
    assert task_of(AutoConfig.for_model("llama", **(head | options))) == expected
    with pytest.raises(CheckpointError, match="has no pad_token_id"):
        task_of(AutoConfig.for_model("llama", **(head | options | {"pad_token_id": None})))


@pytest.mark.parametrize("case", MODELS)
def test_the_longest_input_is_what_the_model_takes(case: str, saved: Saved) -> None:
    longest = blueprint(Checkpoint(saved(case, dtype=torch.float32))).longest_input()
    # RoBERTa numbers positions from behind that of padding, which is 3 here; MPNet's is always 1.
    roberta = case.startswith(("roberta", "xlm-roberta", "camembert"))
    assert longest == (156 if roberta else 158 if case.startswith("mpnet") else 160)
    model = load(saved(case), task(case), torch.float32)
    ids = torch.stack(tokens(longest))
    with torch.no_grad():
        assert torch.isfinite(model(input_ids=ids).logits).all()
        if any(name.endswith(("position_embeddings", "wpe", "embed_positions")) for name, _ in model.named_modules()):
            with pytest.raises((IndexError, RuntimeError)):
                model(input_ids=torch.stack(tokens(longest + 1)))
