"""Names in memory and on disk, for families in which one tensor is made of many."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig, PreTrainedModel, Qwen2MoeConfig

from lowrank_compress.errors import CheckpointError
from lowrank_compress.model.checkpoint import Checkpoint
from lowrank_compress.model.names import names_of
from tests.tiny import tiny_model

SIZES = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def saved(model: PreTrainedModel, path: Path) -> set[str]:
    model.save_pretrained(path)
    return set(Checkpoint(path).files)


@pytest.mark.parametrize(
    "config",
    [
        MixtralConfig(**SIZES, num_local_experts=3),
        Qwen2MoeConfig(**SIZES, num_experts=3, moe_intermediate_size=12, shared_expert_intermediate_size=20),
    ],
    ids=lambda config: config.model_type,
)
def test_experts_that_lie_in_one_parameter_are_found_one_by_one(config, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    stored = saved(model, tmp_path)
    names = names_of(tmp_path, stored, model)
    assert not names.unknown
    assert names.stored.keys() | names.converted.keys() == model.state_dict().keys()
    fused = names.converted["model.layers.1.mlp.experts.gate_up_proj"]
    assert len(fused) == 2 * 3
    assert len(names.converted["model.layers.1.mlp.experts.down_proj"]) == 3
    assert set(names.stored.values()) | {one for several in names.converted.values() for one in several} == stored


def test_a_tensor_stored_twice_is_refused(tmp_path: Path) -> None:
    model = tiny_model("llama")
    stored = {*model.state_dict()}
    with pytest.raises(CheckpointError, match=r"stores the tensor model\.norm\.weight twice"):
        names_of(tmp_path, {*stored, "norm.weight"}, model)
    assert names_of(tmp_path, {*stored, "v_head.weight"}, model).unknown.keys() == {"v_head.weight"}
