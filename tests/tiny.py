"""Tiny random models of every architecture, a tiny tokenizer and text for it; everything made on the spot, offline."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

Task = Literal["lm", "classification"]

SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<pad>")
UNK, BOS, EOS, PAD = range(4)

_WORDS = """
the of and to in is that it was for on with as be by at from this or are which not but have had they you all
we can her has there been if more when will would who so no said what up its about into than them some could time only
new other people over such after now most also made well where just before through back years much your way down
should because long each state those same between never world still own see men work life get being small house night
number part place end light quick brown fox jumps lazy dog while again upon great school every under last
"""
_ALPHABET = "abcdefghijklmnopqrstuvwxyz ,.\n"

_COMMON: dict[str, Any] = {"vocab_size": 96, "bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 72,
    "max_position_embeddings": 160,
}
# Another base than the usual 10000, so that a hard-coded one is noticed.
_ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 5000.0}
_LLAMA: dict[str, Any] = {**_SIZES, "num_key_value_heads": 2, "rope_parameters": _ROPE}
# Layers of two kinds of mask; the heads together are wider than the hidden state.
_GEMMA: dict[str, Any] = {
    **_LLAMA,
    "num_hidden_layers": 3,
    "head_dim": 16,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}

TINY: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "mistral": {**_LLAMA, "sliding_window": 8},
    "qwen2": {**_LLAMA, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "qwen3": {**_LLAMA, "head_dim": 16},
    "gemma2": {**_GEMMA, "query_pre_attn_scalar": 16},
    "gemma3_text": {
        **_GEMMA,
        "query_pre_attn_scalar": 16,
        "rope_parameters": {
            "sliding_attention": _ROPE,
            "full_attention": {"rope_type": "default", "rope_theta": 70000.0},
        },
    },
    "gemma": {**_LLAMA, "head_dim": 16},
    "granite": {
        **_LLAMA,
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.2,
        "residual_multiplier": 0.7,
        "logits_scaling": 1.3,
    },
    "olmo2": _LLAMA,
    "smollm3": {**_LLAMA, "no_rope_layers": [1, 0], "use_sliding_window": False},
    "phi": {**_LLAMA, "rope_parameters": {**_ROPE, "partial_rotary_factor": 0.5}},
    "stablelm": {**_LLAMA, "rope_parameters": {**_ROPE, "partial_rotary_factor": 0.5}},
    "gpt_bigcode": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 72, "n_positions": 160},
    "starcoder2": {**_LLAMA, "sliding_window": 8},
    "cohere": {**_LLAMA, "logit_scale": 0.3},
    "glm": {**_LLAMA, "head_dim": 8, "rope_parameters": {**_ROPE, "partial_rotary_factor": 0.5}},
    "glm4": {**_LLAMA, "head_dim": 8, "rope_parameters": {**_ROPE, "partial_rotary_factor": 0.5}},
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 72, "n_positions": 160, "rotary_dim": 4},
    "phi3": {**_LLAMA, "original_max_position_embeddings": 160},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 72, "n_positions": 160},
    "gpt_neox": {**_SIZES, "rope_parameters": {**_ROPE, "partial_rotary_factor": 0.5}},
    "opt": {
        **{name: size for name, size in _SIZES.items() if name != "intermediate_size"},
        "ffn_dim": 72,
        "word_embed_proj_dim": 32,
    },
    "bert": _SIZES,
    "roberta": _SIZES,
    "modernbert": {
        **_SIZES,
        "num_hidden_layers": 3,
        "global_attn_every_n_layers": 3,
        "local_attention": 8,
        "cls_token_id": BOS,
        "sep_token_id": EOS,
    },
    "mpnet": _SIZES,
    "xlm-roberta": _SIZES,
    "camembert": _SIZES,
    "electra": {**_SIZES, "embedding_size": 24},
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 72, "max_position_embeddings": 160},
}

_WINDOWS: dict[str, Any] = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
_HEADS: dict[str, Any] = {"head_dim": 8}
_SCALED: dict[str, Any] = {"llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 8}

# Families that differ little from those above: each goes through one compression and one proof of narrower heads.
MORE: dict[str, dict[str, Any]] = {
    "cohere2": {**_LLAMA, **_WINDOWS, "logit_scale": 0.3},
    "ernie4_5": {**_LLAMA, **_HEADS},
    "nemotron": {**_LLAMA, "rope_parameters": {**_ROPE, "partial_rotary_factor": 0.5}},
    "arcee": _LLAMA,
    "apertus": {**_LLAMA, **_HEADS},
    "olmo": _LLAMA,
    "olmo3": {**_LLAMA, **_WINDOWS},
    "exaone4": {**_LLAMA, **_WINDOWS},
    "ministral": {**_LLAMA, **_WINDOWS, **_HEADS},
    "ministral3": {**_LLAMA, **_HEADS, "rope_parameters": {**_ROPE, **_SCALED}},
    "seed_oss": {**_LLAMA, **_HEADS},
    "internlm3": {**_LLAMA, **_HEADS},
    "hunyuan_v1_dense": {**_LLAMA, **_HEADS},
    "persimmon": {**_SIZES, "rope_parameters": {**_ROPE, "partial_rotary_factor": 0.5}},
    "falcon": {**_SIZES, "ffn_hidden_size": 72, "rope_parameters": _ROPE},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4, "expansion_ratio": 2, "max_seq_len": 160},
    "gpt_neo": {
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "intermediate_size": 72,
        "max_position_embeddings": 160,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 8,
    },
    "deberta-v2": {
        **_SIZES,
        "relative_attention": True,
        "position_biased_input": False,
        "pos_att_type": ["p2c", "c2p"],
        "position_buckets": 8,
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
    },
    "eurobert": {**_LLAMA, "mask_token_id": EOS},
    "xlm-roberta-xl": {**_SIZES, "num_hidden_layers": 3},
    "ernie": _SIZES,
    "esm": {**_SIZES, "position_embedding_type": "rotary", "mask_token_id": EOS},
}

# Families of one kind of model, and those that differ little from another one: with one of the heads.
_LM_ONLY = ("gemma", "granite", "olmo2", "smollm3", "phi", "stablelm", "gpt_bigcode", "starcoder2", "cohere", "glm")
_LM_ONLY += ("glm4", "gptj")
_CLASSIFICATION_ONLY = ("distilbert", "xlm-roberta", "camembert", "electra", "modernbert", "mpnet")

_CLASSIFICATION_ONLY += ("deberta-v2", "eurobert", "xlm-roberta-xl", "ernie", "esm")

# Families whose heads cannot be made narrower.
WHOLE_HEADS = ("cohere", "glm", "glm4", "gptj", "modernbert", "mpnet")

MORE_WHOLE_HEADS = ("cohere2", "ernie4_5", "exaone4", "ministral3", "hunyuan_v1_dense", "persimmon", "falcon", "bloom")
MORE_WHOLE_HEADS += ("mpt", "gpt_neo", "deberta-v2", "esm")

CASES: list[tuple[str, Task]] = [
    (model_type, task)
    for model_type in TINY
    for task in ("lm", "classification")
    if model_type not in (_CLASSIFICATION_ONLY if task == "lm" else _LM_ONLY)
]

# Configurations of a known model type that change what its blocks hold or how they are wired.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-wide-heads": ("llama", {"head_dim": 12}),
    "llama-many-keys": ("llama", {"num_key_value_heads": 4}),
    "gemma2-untied": ("gemma2", {"tie_word_embeddings": False}),
    "stablelm-parallel": ("stablelm", {"use_parallel_residual": True, "use_qkv_bias": True}),
    "gpt_bigcode-many-keys": ("gpt_bigcode", {"multi_query": False}),
    "phi3-single-key": ("phi3", {"num_key_value_heads": 1}),
    "gpt2-untied": ("gpt2", {"tie_word_embeddings": False}),
    "gpt_neox-sequential": ("gpt_neox", {"use_parallel_residual": False}),
    "gpt_neox-no-biases": ("gpt_neox", {"attention_bias": False}),
    "opt-norm-after": ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 24}),
    "opt-no-biases": ("opt", {"enable_bias": False}),
}

# Everything that a test of single models should run over, by the name of the test case.
MODELS: dict[str, tuple[str, Task, dict[str, Any]]] = {
    **{f"{model_type}-{task}": (model_type, task, {}) for model_type, task in CASES},
    **{name: (model_type, "lm", overrides) for name, (model_type, overrides) in VARIANTS.items()},
}

MORE_MODELS: dict[str, tuple[str, Task, dict[str, Any]]] = {
    **{name: (name, "classification" if name in _CLASSIFICATION_ONLY else "lm", {}) for name in MORE},
    "falcon-grouped": ("falcon", "lm", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-biased": ("falcon", "lm", {"multi_query": False, "alibi": True, "parallel_attn": False, "bias": True}),
    "deberta-own-positions": ("deberta-v2", "classification", {"share_att_key": False}),
}

# Of these the ones whose heads can be made narrower.
NARROWED = {name: case for name, case in MODELS.items() if case[0] not in WHOLE_HEADS}


def tiny_config(model_type: str, task: Task = "lm", **overrides: Any) -> PreTrainedConfig:
    """Return the configuration of a tiny model; `overrides` are configuration fields."""
    fields = _COMMON | (TINY | MORE)[model_type]
    if task == "classification":
        fields |= {"num_labels": 3}
    elif model_type in ("bert", "roberta"):
        fields |= {"is_decoder": True}
    return CONFIG_MAPPING[model_type](**(fields | overrides))


def tiny_model(
    model_type: str, task: Task = "lm", seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any
) -> PreTrainedModel:
    """Return a tiny model in evaluation mode; no parameter, bias or norm weight is left at a neutral value."""
    return random_model(tiny_config(model_type, task, **overrides), task, seed, dtype)


def random_model(
    config: PreTrainedConfig, task: Task = "lm", seed: int = 0, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """Return a model of that configuration with such values."""
    auto = AutoModelForCausalLM if task == "lm" else AutoModelForSequenceClassification
    with torch.random.fork_rng(devices=[]):
        model = auto.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim >= 2:
                parameter.copy_(0.15 * noise)
            elif name.endswith("bias"):
                parameter.copy_(0.1 * noise)
            else:
                parameter.add_(0.2 * noise)
    model.config.architectures = [type(model).__name__]
    return model.to(dtype).eval()


def tiny_text(n_chars: int, seed: int = 0) -> str:
    """Return `n_chars` characters of pseudo-random words, all within the alphabet of `tiny_tokenizer`."""
    rng = random.Random(seed)
    words = _WORDS.split()
    weights = [1 / (rank + 1) for rank in range(len(words))]
    pieces: list[str] = []
    length = 0
    while length < n_chars:
        sentence = " ".join(rng.choices(words, weights, k=rng.randint(3, 14)))
        pieces.append(sentence + rng.choice([". ", ", ", ".\n"]))
        length += len(pieces[-1])
    return "".join(pieces)[:n_chars]


def tiny_tokenizer(directory: Path | str, vocab_size: int = 96, bos: bool = True) -> PreTrainedTokenizerFast:
    """Write a tokenizer that ``AutoTokenizer`` loads, and return it.

    It always has a ``bos_token``; `bos` says whether ``add_special_tokens`` puts it before a text.
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_next")
    tokenizer.decoder = decoders.Fuse()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=list(_ALPHABET),
        show_progress=False,
    )
    tokenizer.train_from_iterator([tiny_text(20_000)], trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", BOS)]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    fast.save_pretrained(directory)
    return fast


def save_tiny(
    model_type: str,
    directory: Path | str,
    task: Task = "lm",
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    bos: bool = True,
    max_shard_size: str = "5GB",
    **overrides: Any,
) -> Path:
    """Write a complete checkpoint, model and tokenizer, and return its directory."""
    path = Path(directory)
    tiny_model(model_type, task, seed, dtype, **overrides).save_pretrained(path, max_shard_size=max_shard_size)
    tiny_tokenizer(path, bos=bos)
    return path
