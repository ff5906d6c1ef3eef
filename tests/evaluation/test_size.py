from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from lowrank_compress.evaluation.size import kv_bytes, measure_size
from lowrank_compress.model.checkpoint import Checkpoint
from tests.ordinary import LM, Saved, load, task, tokens
from tests.tiny import MODELS

# What a block's linear layers are called; norms and embeddings are neither.
LAYERS = (nn.Linear, Conv1D)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return Saved(tmp_path_factory.mktemp("models"))


def blocks_of(model: Any) -> nn.ModuleList:
    """The one list of blocks of a model: the longest one at the top."""
    return max((m for m in model.modules() if isinstance(m, nn.ModuleList)), key=lambda m: sum(1 for _ in m.modules()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", MODELS)
def test_dense_sizes(case: str, dtype: torch.dtype, saved: Saved) -> None:
    model = load(saved(case, dtype), task(case), dtype)
    found = measure_size(Checkpoint(saved(case, dtype)))
    # `parameters` gives a tied tensor once.
    assert found.model == sum(parameter.numel() for parameter in model.parameters())
    assert found.bytes == found.model * dtype.itemsize
    linear = [module for block in blocks_of(model) for module in block.modules() if isinstance(module, LAYERS)]
    assert found.blocks == sum(module.weight.numel() for module in linear)


def copied(saved: Saved, case: str, place: Path) -> dict[str, torch.Tensor]:
    (place / "config.json").write_bytes((saved(case) / "config.json").read_bytes())
    return load_file(saved(case) / "model.safetensors")


@pytest.mark.parametrize(("case", "prefix"), [("gpt2-lm", "transformer."), ("bert-classification", "bert.")])
def test_names_without_the_prefix_of_the_base_model(case: str, prefix: str, saved: Saved, tmp_path: Path) -> None:
    state = {name.removeprefix(prefix): value for name, value in copied(saved, case, tmp_path).items()}
    # Old checkpoints hold buffers that the model does not load.
    state["h.0.attn.bias"] = torch.ones(1, 1, 160, 160)
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    assert measure_size(Checkpoint(tmp_path)) == measure_size(Checkpoint(saved(case)))


@pytest.mark.parametrize("kept", ["both", "embedding", "head"])
def test_tied_tensors_count_once(kept: str, saved: Saved, tmp_path: Path) -> None:
    state = copied(saved, "llama-tied", tmp_path)
    embedding = state.pop("model.embed_tokens.weight")
    if kept != "head":
        state["model.embed_tokens.weight"] = embedding
    if kept != "embedding":
        state["lm_head.weight"] = embedding.clone()
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    assert measure_size(Checkpoint(tmp_path)) == measure_size(Checkpoint(saved("llama-tied")))


def test_compressed_sizes(saved: Saved, tmp_path: Path) -> None:
    """Factors, coefficients and indices are what stands in a block; the empty marker counts nothing."""
    dense = measure_size(Checkpoint(saved("gpt2-lm")))
    state = copied(saved, "gpt2-lm", tmp_path)
    name = "transformer.h.1.mlp.c_fc"
    del state[f"{name}.weight"]
    state |= {
        f"{name}.weight": torch.empty(0),
        f"{name}.lr_in.weight": torch.zeros(9, 32),
        f"{name}.lr_out.weight": torch.zeros(63, 9),
        f"{name}.lr_index": torch.arange(9, dtype=torch.int32),
    }
    entry = {
        "in_features": 32,
        "out_features": 72,
        "bias": True,
        "parts": [{"rows": 72, "format": "pivot", "rank": 9}],
    }
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "lowrank", "version": 2, "modules": {name: entry}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    found = measure_size(Checkpoint(tmp_path))
    saving = 32 * 72 - (9 * 32 + 63 * 9 + 9)
    assert (found.blocks, found.model) == (dense.blocks - saving, dense.model - saving)
    assert found.bytes == dense.bytes - 4 * saving
    assert found.kv_bytes_per_token == dense.kv_bytes_per_token


@pytest.mark.versions
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", LM)
def test_cache_bytes_equal_a_real_cache(case: str, dtype: torch.dtype, saved: Saved) -> None:
    model = load(saved(case, dtype), "lm", dtype)
    with torch.no_grad():
        cache = model(input_ids=torch.stack(tokens(5)), use_cache=True).past_key_values
    real = sum(part.nbytes for layer in cache.layers for part in (layer.keys, layer.values))
    assert kv_bytes(Checkpoint(saved(case, dtype))) == real / 5


def test_a_classifier_has_no_cache(saved: Saved) -> None:
    assert kv_bytes(Checkpoint(saved("llama-classification"))) == 0
