"""The proof before any work: attention that narrower heads could not reproduce is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel
from transformers.models.llama import modeling_llama

from lowrank_compress.arch.resolve import resolve
from lowrank_compress.errors import UnsupportedError
from lowrank_compress.model.checkpoint import Checkpoint
from lowrank_compress.model.narrowing import check_narrowing, unlike_attentions
from lowrank_compress.model.skeleton import Skeleton
from lowrank_compress.model.walk.batch import Batch
from lowrank_compress.model.walk.replay import Replay
from lowrank_compress.model.walk.walk import Walk
from tests.families import family, register
from tests.moe import moe_model
from tests.ordinary import Saved, load, padded, task, tokens
from tests.tiny import MORE_MODELS, MORE_WHOLE_HEADS, save_tiny, tiny_model, tiny_tokenizer

BATCH = Batch(torch.arange(4, 44).view(2, 20))


@pytest.fixture
def skeleton(tmp_path: Path) -> Skeleton:
    return Skeleton(Checkpoint(save_tiny("llama", tmp_path)), torch.device("cpu"), torch.float32)


def test_the_familys_own_attention_passes_and_the_model_stays_stock(skeleton: Skeleton) -> None:
    names = list(skeleton.model.state_dict())
    check_narrowing(skeleton, BATCH)
    assert list(skeleton.model.state_dict()) == names
    assert {type(block.self_attn) for block in skeleton.blocks} == {modeling_llama.LlamaAttention}


def test_attention_that_does_something_more_is_refused(skeleton: Skeleton, monkeypatch: pytest.MonkeyPatch) -> None:
    stock = modeling_llama.LlamaAttention.forward

    def louder(self: Any, *args: Any, **kwargs: Any) -> Any:
        out, weights = stock(self, *args, **kwargs)
        return 1.01 * out, weights

    monkeypatch.setattr(modeling_llama.LlamaAttention, "forward", louder)
    with pytest.raises(UnsupportedError, match="computes something else than attention with narrower heads"):
        check_narrowing(skeleton, BATCH)


def test_pairs_that_are_neighbours_are_refused(skeleton: Skeleton, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other families turn dimension 2i with 2i + 1; dropping their pairs as halves would ruin the model."""

    def interleaved(q: Any, k: Any, cos: Any, sin: Any) -> Any:
        half = cos.shape[-1] // 2
        cos, sin = (table[..., :half].repeat_interleave(2, -1).unsqueeze(1) for table in (cos, sin))

        def turn(x: Any) -> Any:
            return torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)

        return q * cos + turn(q) * sin, k * cos + turn(k) * sin

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", interleaved)
    with pytest.raises(UnsupportedError, match="computes something else than attention with narrower heads"):
        check_narrowing(skeleton, BATCH)


def saved(model: PreTrainedModel, directory: Path) -> Skeleton:
    model.save_pretrained(directory)
    tiny_tokenizer(directory)
    return Skeleton(Checkpoint(directory), torch.device("cpu"), torch.float32)


@pytest.mark.parametrize(("name", "entry"), [("smollm3", "SMOLLM3"), ("olmo2", "OLMO2")])
def test_what_an_entry_declares_is_computed(
    name: str, entry: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(monkeypatch, entry)
    check_narrowing(saved(family(name), tmp_path), BATCH)


@pytest.mark.parametrize(
    ("name", "entry", "message"),
    [
        ("smollm3", "PLAIN_SMOLLM3", r"model.layers.1.self_attn of SmolLM3ForCausalLM computes something else than"),
        ("olmo2", "PLAIN_OLMO2", r"model.layers.0.self_attn of Olmo2ForCausalLM does not run .*norms of their own"),
        ("olmo2", "HEAD_NORMED_OLMO2", r"model.layers.0.self_attn of Olmo2ForCausalLM does not run .*RuntimeError: "),
    ],
)
def test_what_an_entry_does_not_declare_is_refused_by_name_and_the_model_stays_stock(
    name: str, entry: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(monkeypatch, entry)
    skeleton = saved(family(name), tmp_path)
    types = [type(module) for module in skeleton.model.modules()]
    with pytest.raises(UnsupportedError, match=rf"{message}.*Give the attention a linear method"):
        check_narrowing(skeleton, BATCH)
    assert [type(module) for module in skeleton.model.modules()] == types
    assert {tensor.device.type for block in skeleton.blocks for tensor in block.parameters()} == {"meta"}


@pytest.mark.parametrize("failure", [KeyError, AttributeError, AssertionError, ZeroDivisionError])
def test_any_failure_is_a_refusal(
    failure: type[Exception], skeleton: Skeleton, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise failure("no such thing")

    monkeypatch.setattr("lowrank_compress.shipped.attention.CompressedAttention.forward", fail)
    with pytest.raises(UnsupportedError, match=rf"model.layers.0.self_attn .*{failure.__name__}.*no such thing"):
        check_narrowing(skeleton, BATCH)
    assert {type(block.self_attn) for block in skeleton.blocks} == {modeling_llama.LlamaAttention}


def test_no_memory_is_no_refusal(skeleton: Skeleton, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("too large")

    monkeypatch.setattr("lowrank_compress.shipped.attention.CompressedAttention.forward", fail)
    with pytest.raises(torch.OutOfMemoryError, match="too large"):
        check_narrowing(skeleton, BATCH)


@pytest.mark.parametrize(
    ("model_type", "overrides", "expected"),
    [
        ("llama", {"num_hidden_layers": 3}, [0]),
        ("gemma2", {}, [0, 1]),
        ("gemma3_text", {}, [0, 1]),
        ("qwen2", {}, [0, 1]),
        ("gpt2", {}, [0]),
        # Its layers divide their scores by their number.
        ("gpt2", {"n_layer": 3, "scale_attn_by_inverse_layer_idx": True}, [0, 1, 2]),
        ("bert", {}, [0]),
    ],
)
def test_a_block_of_each_kind_is_looked_at(model_type: str, overrides: dict[str, Any], expected: list[int]) -> None:
    model = tiny_model(model_type, **overrides)
    assert unlike_attentions(model, resolve(model)) == expected


def test_layers_without_positions_and_with_another_module_are_of_another_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, "SMOLLM3")
    model: Any = family("smollm3")
    assert unlike_attentions(model, resolve(model)) == [0, 1]
    model.model.layers[2].self_attn.extra = torch.nn.Identity()
    assert unlike_attentions(model, resolve(model)) == [0, 1, 2]


@pytest.mark.parametrize("case", MORE_MODELS)
def test_families_that_differ_little(case: str, tmp_path: Path) -> None:
    """Block by block they compute what they do whole, and heads are narrower where that computes the same."""
    kept = Saved(tmp_path)
    skeleton = Skeleton(Checkpoint(kept(case)), torch.device("cpu"), torch.float32)
    model = load(kept(case), task(case), torch.float32)
    batches = [BATCH, Batch(*padded(tokens(13, 7, 9, seed=3)))]
    walk = Walk([skeleton], batches)
    for step in walk.forwards():
        step.leave()
    for number, batch in enumerate(batches):
        with torch.no_grad():
            expected = model(input_ids=batch.ids, attention_mask=batch.mask).logits
            found = walk.head(number, walk.leaving(number))
        assert (found - expected).abs().max() <= 5e-6 * expected.abs().max()
    if MORE_MODELS[case][0] not in MORE_WHOLE_HEADS:
        check_narrowing(skeleton, BATCH)
        return
    with pytest.raises(UnsupportedError, match=r"with narrower heads .*--attention kfac"):
        check_narrowing(skeleton, BATCH)


@pytest.mark.parametrize("model_type", ["olmo", "olmoe"])
def test_bounded_queries_and_keys_are_refused_even_where_no_bound_is_met(model_type: str, tmp_path: Path) -> None:
    model = tiny_model("olmo", clip_qkv=1e9) if model_type == "olmo" else moe_model("olmoe", clip_qkv=1e9)
    with pytest.raises(UnsupportedError, match=rf"'{model_type}'.*clip_qkv.*--attention kfac"):
        check_narrowing(saved(model, tmp_path), BATCH)


def test_what_lies_between_blocks_is_refused(tmp_path: Path) -> None:
    """DeBERTa's largest models have a convolution behind the first block; the walk would pass it over."""
    model = tiny_model("deberta-v2", "classification", conv_kernel_size=3)
    with pytest.raises(UnsupportedError, match="changes the hidden states on the way from block 0 to block 1"):
        list(Replay(saved(model, tmp_path), [BATCH]).start())
