from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModel, PreTrainedConfig

from lowrank_compress.arch.table import ARCHITECTURES, architecture_of
from lowrank_compress.errors import UnsupportedError
from tests.moe import MOE
from tests.tiny import MORE, TINY, tiny_config


def test_every_model_type_has_a_tiny_model() -> None:
    listed = [model_type for entry in ARCHITECTURES.values() for model_type in entry.model_types]
    tiny = [*TINY, *MORE, *MOE]
    assert sorted(listed) == sorted(tiny), (
        "every model type of the table needs an entry in tests/tiny.py or moe.py, once"
    )


@pytest.mark.parametrize("name", MOE)
def test_entry_of_experts_is_consistent(name: str) -> None:
    entry = ARCHITECTURES[name]
    attention, dense, shared = (
        [role for each in entry.projections if each.path.startswith(place) for role in each.parts]
        for place in ("self_attn.", "mlp.", "mlp.shared")
    )
    latent = name.startswith("deepseek")
    assert entry.latent == latent
    assert attention == (["q", "q_a", "q_b", "kv_a", "kv_b", "o"] if latent else ["q", "k", "v", "o"])
    assert shared in ([], ["gate", "up", "down"])
    assert dense in ([], 2 * ["gate", "up", "down"] if shared else ["gate", "up", "down"])
    assert entry.experts == "mlp.experts"
    first = ["latent"] if latent else ["qk", "vo"]
    assert [group.name for group in entry.groups] == [*first, "mlp", "experts"]
    assert entry.groups[-1].kind == "mlp"


@pytest.mark.parametrize("name", TINY)
def test_entry_is_consistent(name: str) -> None:
    entry = ARCHITECTURES[name]
    roles = [role for projection in entry.projections for role in projection.parts]
    gated = ["gate"] if "gate" in roles else []
    assert entry.name == name
    assert roles == ["q", "k", "v", "o", *gated, "up", "down"]
    side_by_side = name in ("phi", "cohere", "gptj")
    mlp = "attn" if side_by_side else "mlp"
    reads = {"q": "attn", "k": "attn", "v": "attn", "o": "context", "gate": mlp, "up": mlp, "down": "hidden"}
    assert all(projection.reads == reads[role] for projection in entry.projections for role in projection.parts)


def test_every_model_type_is_in_the_page_of_models() -> None:
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
    assert [name for name in ARCHITECTURES.own if f"`{name}`" not in page] == []


@pytest.mark.parametrize("name", MORE)
def test_entry_that_differs_little_is_consistent(name: str) -> None:
    entry = ARCHITECTURES[name]
    roles = [role for projection in entry.projections for role in projection.parts]
    gated = ["gate"] if "gate" in roles else []
    assert (entry.name, entry.model_types) == (name, (name,))
    assert roles == [*([] if name == "deberta-v2" else ["q", "k"]), "v", "o", *gated, "up", "down"]
    assert [group.name for group in entry.groups] == [*([] if name == "deberta-v2" else ["qk"]), "vo", "mlp"]


@pytest.mark.parametrize("model_type", TINY)
def test_entry_found_and_head_norms_true_to_the_model(model_type: str) -> None:
    config = tiny_config(model_type)
    entry = architecture_of(config)
    assert model_type in entry.model_types
    with torch.device("meta"):
        names = [name for name, _ in AutoModel.from_config(config).named_parameters()]
    assert entry.head_norms == any(name.endswith(("q_norm.weight", "k_norm.weight")) for name in names)


@pytest.mark.parametrize(
    ("model_type", "field"),
    [
        ("jamba", "num_experts=16"),
        ("ernie4_5_moe", "moe_num_experts=64"),
        ("llama4", "num_local_experts=16"),
    ],
)
def test_other_mixtures_of_experts_are_refused(model_type: str, field: str) -> None:
    known = "Supported are mixtral, qwen2_moe, qwen3_moe, olmoe, deepseek_v2, deepseek_v3, gpt_oss"
    with pytest.raises(UnsupportedError, match=f"Mixture-of-experts models of this kind.*{field}.*{known}"):
        architecture_of(CONFIG_MAPPING[model_type]())


def test_experts_of_a_known_type_are_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"Mixture-of-experts.*'llama' has num_experts=4"):
        architecture_of(tiny_config("llama", num_experts=4))


def test_one_expert_is_a_dense_model() -> None:
    assert architecture_of(tiny_config("llama", num_experts=1)).name == "llama"


@pytest.mark.parametrize("model_type", ["t5", "bart"])
def test_encoder_decoders_are_refused_by_name(model_type: str) -> None:
    with pytest.raises(UnsupportedError, match=rf"Encoder-decoder.*'{model_type}' has two stacks.*supported.*roberta"):
        architecture_of(CONFIG_MAPPING[model_type]())


def test_shared_blocks_are_refused_by_name() -> None:
    with pytest.raises(UnsupportedError, match=r"'albert' runs the same block several times.*supported.*roberta"):
        architecture_of(CONFIG_MAPPING["albert"]())


@pytest.mark.parametrize("model_type", ["gemma3", "llava", "qwen2_vl"])
def test_multimodal_models_are_refused(model_type: str) -> None:
    with pytest.raises(UnsupportedError, match=f"Multimodal.*'{model_type}' has a vision_config.*gemma3_text"):
        architecture_of(CONFIG_MAPPING[model_type]())


def test_unknown_type_lists_the_known() -> None:
    with pytest.raises(UnsupportedError, match=r"Unknown model type 'codegen'\. Known: .*roberta"):
        architecture_of(CONFIG_MAPPING["codegen"]())


def test_configuration_without_a_type_is_unknown() -> None:
    with pytest.raises(UnsupportedError, match=r"Unknown model type ''"):
        architecture_of(PreTrainedConfig())


@pytest.mark.parametrize("model_type", ["gpt2", "bert", "roberta"])
def test_cross_attention_is_refused(model_type: str) -> None:
    with pytest.raises(UnsupportedError, match=r"cross-attention are not supported.*add_cross_attention"):
        architecture_of(tiny_config(model_type, is_decoder=True, add_cross_attention=True))
