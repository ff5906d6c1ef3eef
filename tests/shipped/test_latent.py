"""Attention that caches latents: against stock attention with the same products, and with all kinds of caches."""

from __future__ import annotations

import copy
import inspect
import pickle
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import QuantizedLayer
from transformers.utils import is_optimum_quanto_available

from lowrank_compress.shipped.latent import LatentAttention
from lowrank_compress.shipped.restore import restore_modules
from tests.shipped.latents import remembering, slowly
from tests.tiny import MODELS, tiny_model

torch.set_num_threads(1)
pytestmark = pytest.mark.versions

# What keeps a stock cache anyway (sliding windows, other rotary tables a layer) is refused.
OVERRIDES: dict[str, dict[str, Any]] = {
    "mistral-lm": {"sliding_window": None},
    "qwen2-lm": {"use_sliding_window": False},
}
FAMILIES = [
    *("llama-lm", "mistral-lm", "qwen2-lm", "qwen3-lm", "gemma-lm", "granite-lm", "olmo2-lm", "smollm3-lm", "phi-lm"),
    *("stablelm-lm", "gpt_bigcode-lm", "phi3-lm", "gpt2-lm", "gpt_neox-lm", "opt-lm", "llama-biases"),
    *("gpt_bigcode-many-keys", "phi3-single-key"),
]
IDS = torch.tensor([[5, 9, 2, 30, 41, 7, 3, 12, 33, 8, 51, 17], [11, 4, 8, 8, 60, 23, 90, 5, 6, 71, 14, 9]])


def one(case: str) -> PreTrainedModel:
    model_type, task, variant = MODELS[case]
    return tiny_model(model_type, task, dtype=torch.float64, **variant, **OVERRIDES.get(case, {}))


def cache_of(model: PreTrainedModel, kind: str) -> Any:
    return DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(model.config, max_cache_len=16)


def in_pieces(model: PreTrainedModel, ids: Tensor, pieces: list[int], kind: str = "dynamic") -> Tensor:
    """Logits of all tokens, so many at a time."""
    cache, found = cache_of(model, kind), []
    for piece in ids.split(pieces, 1):
        found.append(step(model, piece, cache))
    return torch.cat(found, 1)


def step(model: PreTrainedModel, ids: Tensor, cache: Any) -> Tensor:
    """Logits of the next tokens, which go into the cache; its name is another in older versions of transformers."""
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    return model(ids, **{name: cache}, use_cache=True).logits


@torch.no_grad()
@pytest.mark.parametrize("case", FAMILIES)
def test_it_equals_the_products(case: str) -> None:
    model, product = remembering(one(case), 5, 0)
    expected = product(IDS).logits
    torch.testing.assert_close(model(IDS).logits, expected, rtol=0, atol=1e-9)
    for kind in ("dynamic", "static"):
        found = in_pieces(model, IDS, [5, 1, 1, 4, 1], kind)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    restore_modules(model)
    assert not any(isinstance(module, LatentAttention) for module in model.modules())
    assert model.state_dict().keys() == product.state_dict().keys()
    torch.testing.assert_close(model(IDS).logits, expected, rtol=0, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("case", ["llama-lm", "qwen3-lm", "gpt2-lm", "gpt_neox-lm", "phi-lm"])
def test_a_window_is_exact(case: str, attention: str) -> None:
    stock = one(case)
    model, product = remembering(stock, 5, 4)
    expected = slowly(stock, product, 4)(IDS).logits
    model.set_attn_implementation(attention)
    # Eager attention takes its softmax in single precision.
    close = partial(torch.testing.assert_close, rtol=0, atol=1e-9 if attention == "sdpa" else 3e-6)
    close(model(IDS).logits, expected)
    assert (product(IDS).logits - expected).abs().max() > 1e-3 < (stock(IDS).logits - expected).abs().max()
    for kind in ("dynamic", "static"):
        for pieces in ([5, 1, 1, 4, 1], [1] * 12, [2, 1, 9]):
            close(in_pieces(model, IDS, pieces, kind), expected)
    restore_modules(model)
    close(model(IDS).logits, stock(IDS).logits)


@torch.no_grad()
@pytest.mark.parametrize("window", [0, 1, 3])
@pytest.mark.parametrize("case", ["llama-lm", "gpt2-lm"])
def test_all_ways_to_generate_give_the_same_tokens(case: str, window: int) -> None:
    model: Any
    model, _ = remembering(one(case), 6, window)
    padded = torch.cat([torch.full((2, 3), 94), IDS], 1)
    mask = (torch.arange(15) >= 3).long().expand(2, -1)
    options: dict[str, Any] = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 94, "eos_token_id": None}
    for beams in (1, 3):
        expected = model.generate(IDS, **options, num_beams=beams, use_cache=False)
        assert len(expected.unique(dim=0)) == 2
        for given in ({}, {"cache_implementation": "static"}):
            found = model.generate(IDS, **options, num_beams=beams, **given)
            assert found.equal(expected)
        found = model.generate(padded, attention_mask=mask, **options, num_beams=beams)
        assert found[:, 3:].equal(expected)


@torch.no_grad()
@pytest.mark.parametrize("window", [0, 3])
def test_what_the_cache_keeps(window: int) -> None:
    model, _ = remembering(one("llama-lm"), 5, window)
    cache: Any = DynamicCache(config=model.config)
    step(model, IDS, cache)
    for layer in cache.layers:
        assert layer.keys.shape == (2, 1, 12, 3)
        assert layer.values.shape == (2, 1, 12, 2)
        assert window == 0 or [states.shape for states in layer.lr_exact] == [(2, 2, 2, 8)] * 2
    # Copies work on from where the original stands; taken back tokens, from their latents.
    whole = torch.cat([IDS, IDS[:, :3]], 1)
    expected = model(whole).logits[:, 12:]
    for other in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        found = step(model, whole[:, 12:], other)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
        other.crop(-3)
        assert other.get_seq_length() == 12
        again = step(model, whole[:, 12:], other)
        assert again.shape == expected.shape
        if not window:
            torch.testing.assert_close(again, expected, rtol=0, atol=1e-9)
        other.batch_select_indices(torch.tensor([1]))
        other.batch_repeat_interleave(2)
        other.reset()
        assert other.get_seq_length() == 0
        found = step(model, IDS, other)
        torch.testing.assert_close(found, model(IDS).logits, rtol=0, atol=1e-9)


class Unrounded(QuantizedLayer):
    """A cache that quantizes, by a backend that loses nothing."""

    def __init__(self, group: int) -> None:
        super().__init__(residual_length=3, q_group_size=group)

    def _quantize(self, tensor: Tensor, axis: int) -> Tensor:
        assert tensor.numel() % self.q_group_size == 0  # or optimum-quanto refuses it
        return tensor.clone()

    def _dequantize(self, qtensor: Tensor) -> Tensor:
        return qtensor


@torch.no_grad()
@pytest.mark.parametrize(("window", "group"), [(0, 1), (3, 1), (0, 4), (3, 8)])
def test_quantized_caches_keep_latents(window: int, group: int) -> None:
    """Once the residual is full, all is in what was quantized, and exact keys and values stay beside it.

    Groups divide both halves of latents, whatever their rank.
    """
    model: Any
    model, _ = remembering(one("llama-lm"), 5, window)
    cache: Any = Cache(layers=[Unrounded(group) for _ in range(model.config.num_hidden_layers)])
    found = torch.cat([step(model, piece, cache) for piece in IDS.split([5, 1, 1, 4, 1], 1)], 1)
    torch.testing.assert_close(found, model(IDS).logits, rtol=0, atol=1e-9)
    for layer in cache.layers:
        widths = [layer._quantized_keys.shape[-1], layer._quantized_values.shape[-1]]
        assert sum(widths) == 5 if group == 1 else widths == [group, group]
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 94, "eos_token_id": None}
    if is_optimum_quanto_available():
        return  # what it rounds to is its own
    with pytest.raises(ImportError, match="optimum-quanto"):
        model.generate(IDS, **options, cache_implementation="quantized")


@torch.no_grad()
def test_copies_of_a_model_turn_with_their_own_tables() -> None:
    model, _ = remembering(one("llama-lm"), 5, 3)
    expected = in_pieces(model, IDS, [4, 1, 7])
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        attention: Any = other.get_submodule("model.layers.1.self_attn")
        assert attention.lr_turning[0] is other.get_submodule("model.rotary_emb")
        assert in_pieces(other, IDS, [4, 1, 7]).equal(expected)


def test_other_attention_functions_have_no_window() -> None:
    model, _ = remembering(one("llama-lm"), 5, 3)
    model.config._attn_implementation = "latents_attend"
    with pytest.raises(ValueError, match="window of exact positions works with sdpa and eager attention, got latents"):
        model(IDS)


@pytest.mark.parametrize("case", ["mistral-lm", "gemma3_text-lm", "gemma2-lm"])
def test_a_sliding_window_is_refused(case: str) -> None:
    model_type, task, variant = MODELS[case]
    model = tiny_model(model_type, task, dtype=torch.float64, **variant)
    with pytest.raises(ValueError, match="it sees a sliding window of tokens"):
        remembering(model, 5, 0)


def test_tables_that_depend_on_the_length_are_refused() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 5000.0, "factor": 2.0}
    model = tiny_model("llama", dtype=torch.float64, rope_parameters=rope)
    with pytest.raises(ValueError, match=r"rotary embeddings \(dynamic\) depend on how long the text is"):
        remembering(model, 5, 0)
