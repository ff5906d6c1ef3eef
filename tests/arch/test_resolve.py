from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from lowrank_compress.arch import resolve as module
from lowrank_compress.arch.resolve import block_paths, resolve
from lowrank_compress.arch.table import ARCHITECTURES
from lowrank_compress.arch.targets import Resolved, Rows
from lowrank_compress.errors import UnsupportedError
from tests.tiny import CASES, MODELS, tiny_config, tiny_model


def build(name: str) -> PreTrainedModel:
    model_type, task, overrides = MODELS[name]
    return tiny_model(model_type, task, **overrides)


@pytest.mark.parametrize("name", MODELS)
def test_claims_every_matrix_of_the_blocks(name: str) -> None:
    model = build(name)
    resolved = resolve(model)
    blocks = [model.get_submodule(path) for path in resolved.blocks]
    matrices = {id(p): p.numel() for block in blocks for p in block.parameters() if p.ndim >= 2}
    assert len(blocks) == model.config.num_hidden_layers
    assert sum(target.elements for target in resolved.targets) == sum(matrices.values())
    assert len({target.name for target in resolved.targets}) == len(resolved.targets)


@pytest.mark.parametrize("name", MODELS)
def test_parts_partition_the_rows_of_their_module(name: str) -> None:
    model = build(name)
    for path, targets in resolve(model).modules().items():
        rows = torch.cat([target.view.rows.index() for target in targets])
        bias = model.get_submodule(path).bias
        outputs = model.get_submodule(path)(torch.zeros(1, targets[0].shape[1])).shape[-1]
        assert sorted(rows.tolist()) == list(range(outputs))
        assert {target.view.rows.total for target in targets} == {outputs}
        assert {target.bias is not None for target in targets} == {bias is not None}


@pytest.mark.parametrize(("model_type", "task"), CASES)
def test_meta_model_resolves_alike(model_type: str, task: Any) -> None:
    auto = AutoModelForCausalLM if task == "lm" else AutoModelForSequenceClassification
    with torch.device("meta"):
        model = auto.from_config(tiny_config(model_type, task))
        resolved = resolve(model)
        assert resolved.targets[0].view.rows.index().device.type == "cpu"
    assert resolved == resolve(tiny_model(model_type, task))


def inputs_of(model: PreTrainedModel, resolved: Resolved) -> dict[str, torch.Tensor]:
    """Run the model once and record what each claimed module receives."""
    seen: dict[str, torch.Tensor] = {}
    for path in resolved.modules():

        def keep(_module: nn.Module, args: tuple[torch.Tensor, ...], path: str = path) -> None:
            assert path not in seen, "a claimed module runs once"
            seen[path] = args[0]

        model.get_submodule(path).register_forward_pre_hook(keep)
    with torch.no_grad():
        model(torch.arange(4, 44).reshape(2, 20))
    return seen


@pytest.mark.parametrize("name", MODELS)
def test_reads_names_one_tensor(name: str) -> None:
    model = build(name)
    resolved = resolve(model)
    inputs = inputs_of(model, resolved)
    for index in range(len(resolved.blocks)):
        read: dict[str, torch.Tensor] = {}
        for target in resolved.of_block(index):
            first = read.setdefault(target.reads, inputs[target.module])
            assert inputs[target.module] is first
        distinct = list(read.values())
        assert len(distinct) == len({p.reads for p in resolved.architecture.projections})
        if name == "stablelm-parallel":  # two names for one tensor: counted twice, and right
            continue
        for position, tensor in enumerate(distinct):
            assert not any(tensor.shape == other.shape and tensor.equal(other) for other in distinct[:position])


def test_names_of_fused_and_plain_targets() -> None:
    resolved = resolve(tiny_model("phi3"))
    assert [(target.name, target.shape) for target in resolved.of_block(1)] == [
        ("model.layers.1.self_attn.qkv_proj:q", (32, 32)),
        ("model.layers.1.self_attn.qkv_proj:k", (16, 32)),
        ("model.layers.1.self_attn.qkv_proj:v", (16, 32)),
        ("model.layers.1.self_attn.o_proj", (32, 32)),
        ("model.layers.1.mlp.gate_up_proj:gate", (72, 32)),
        ("model.layers.1.mlp.gate_up_proj:up", (72, 32)),
        ("model.layers.1.mlp.down_proj", (32, 72)),
    ]
    assert resolved.blocks == ("model.layers.0", "model.layers.1")


def test_interleaved_rows() -> None:
    q, k, v = resolve(tiny_model("gpt_neox")).targets[:3]
    assert (q.view.rows, k.view.rows, v.view.rows) == (Rows(4, 24, 0, 8), Rows(4, 24, 8, 8), Rows(4, 24, 16, 8))
    assert k.view.rows.index().tolist()[6:10] == [14, 15, 32, 33]


def test_base_model_has_no_prefix() -> None:
    resolved = resolve(AutoModel.from_config(tiny_config("opt")))
    assert resolved.blocks == ("decoder.layers.0", "decoder.layers.1")


@given(st.integers(1, 5), st.integers(0, 5), st.integers(1, 6), st.integers(0, 4))
def test_rows_index_is_the_law(groups: int, offset: int, length: int, after: int) -> None:
    rows = Rows(groups, offset + length + after, offset, length)
    expected = [g * rows.stride + rows.offset + j for g in range(groups) for j in range(length)]
    assert rows.index().tolist() == expected
    assert rows.index().dtype == torch.int64
    assert rows.size == len(expected)
    assert expected[-1] < rows.total


def test_extra_matrix_in_a_block_is_named() -> None:
    model = tiny_model("llama")
    model.model.layers[1].mlp.extra = nn.Linear(32, 5)
    with pytest.raises(UnsupportedError, match=r"model\.layers\.1\.mlp\.extra\.weight of shape \(5, 32\) is neither"):
        resolve(model)


def test_extra_parameter_of_a_claimed_module_is_named() -> None:
    model = tiny_model("llama")
    model.model.layers[0].mlp.up_proj.table = nn.Parameter(torch.zeros(2, 3, 4))
    with pytest.raises(UnsupportedError, match=r"up_proj\.table of shape \(2, 3, 4\) is neither claimed nor ignored"):
        resolve(model)


def test_ignored_pattern_lets_a_matrix_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = ARCHITECTURES["llama"]
    ignoring = replace(entry, ignored=("mlp.extra.*",))
    monkeypatch.setattr(module, "architecture_of", lambda _config: ignoring)
    model = tiny_model("llama")
    expected = resolve(model).targets
    model.model.layers[1].mlp.extra = nn.Linear(32, 5)
    assert resolve(model).targets == expected


def test_missing_module_is_named() -> None:
    model = tiny_model("llama")
    del model.model.layers[1].self_attn.k_proj
    with pytest.raises(
        UnsupportedError, match=r"has nothing at 'model\.layers\.1\.self_attn\.k_proj'; expected a Linear"
    ):
        resolve(model)


def test_module_of_another_class_is_named_but_blocks_are_found() -> None:
    model = tiny_model("gpt2")
    model.set_submodule("transformer.h.0.mlp.c_fc", nn.Linear(32, 72))
    with pytest.raises(UnsupportedError, match=r"has Linear at 'transformer\.h\.0\.mlp\.c_fc'; expected a Conv1D"):
        resolve(model)
    assert block_paths(model) == ("transformer.h.0", "transformer.h.1")


def test_quantized_weight_is_refused() -> None:
    model = tiny_model("llama")
    model.model.layers[0].mlp.up_proj.weight = nn.Parameter(torch.zeros(72, 32, dtype=torch.int8), requires_grad=False)
    with pytest.raises(UnsupportedError, match=r"up_proj\.weight is a torch\.int8 tensor.*Quantized models"):
        resolve(model)


def test_packed_weight_is_refused() -> None:
    model = tiny_model("llama")
    model.model.layers[0].mlp.up_proj.weight = nn.Parameter(torch.zeros(1152))
    with pytest.raises(UnsupportedError, match=r"of shape \(1152,\); expected a floating-point matrix"):
        resolve(model)


@pytest.mark.parametrize(
    ("model_type", "field", "value", "message"),
    [
        ("llama", "num_key_value_heads", 4, r"k_proj\.weight has shape \(16, 32\) as \(out, in\); expected \(32, 32\)"),
        ("phi3", "num_key_value_heads", 4, r"qkv_proj\.weight has shape \(64, 32\) as .*; expected \(96, 32\)"),
        ("gpt2", "hidden_size", 40, r"c_attn\.weight has shape \(96, 32\) as .*; expected \(120, 40\)"),
        ("qwen3", "head_dim", 8, r"q_proj\.weight has shape \(64, 32\) as .*; expected \(32, 32\).*heads of size 8"),
    ],
)
def test_shape_against_the_configuration(model_type: str, field: str, value: int, message: str) -> None:
    model = tiny_model(model_type)
    setattr(model.config, field, value)
    with pytest.raises(UnsupportedError, match=message):
        resolve(model)


def test_gate_against_down() -> None:
    model = tiny_model("llama")
    model.model.layers[0].mlp.gate_proj = nn.Linear(32, 70)
    with pytest.raises(UnsupportedError, match=r"gate_proj\.weight has shape \(70, 32\).*inner size is 72"):
        resolve(model)


def test_model_without_blocks() -> None:
    model = tiny_model("llama")
    model.model.layers = nn.Identity()
    with pytest.raises(UnsupportedError, match=r"has Identity at 'model\.layers'; expected the list of transformer"):
        resolve(model)
