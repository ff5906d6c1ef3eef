from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lowrank_compress.arch.resolve import resolve
from lowrank_compress.arch.targets import Rows, Target, View
from lowrank_compress.errors import CheckpointError
from lowrank_compress.model.weights import bias, place, place_bias, read
from tests.tiny import MODELS, tiny_model


def build(name: str) -> PreTrainedModel:
    model_type, task, overrides = MODELS[name]
    return tiny_model(model_type, task, dtype=torch.float64, **overrides)


@pytest.mark.parametrize("name", MODELS)
def test_part_computes_its_columns_of_the_module(name: str) -> None:
    model = build(name)
    for target in resolve(model).targets:
        module: Any = model.get_submodule(target.module)
        x = torch.randn(5, target.shape[1], dtype=torch.float64)
        y = x @ read(module.weight, target).T
        if target.bias:
            y = y + bias(module.bias, target)
        torch.testing.assert_close(module(x)[:, target.view.rows.index()], y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_place_is_the_inverse_of_read(name: str) -> None:
    model = build(name)
    for path, targets in resolve(model).modules().items():
        module: Any = model.get_submodule(path)
        weight = torch.full_like(module.weight, torch.nan)
        for target in targets:
            assert place(weight, target, read(module.weight, target)) is weight
        assert weight.equal(module.weight)
        if targets[0].bias:
            vector = torch.full_like(module.bias, torch.nan)
            for target in targets:
                assert place_bias(vector, target, bias(module.bias, target)) is vector
            assert vector.equal(module.bias)


@pytest.mark.parametrize("model_type", ["llama", "phi3", "gpt2", "gpt_neox"])
def test_place_changes_no_other_part(model_type: str) -> None:
    model = tiny_model(model_type)
    for path, targets in resolve(model).modules().items():
        module: Any = model.get_submodule(path)
        for target in targets:
            before = {other.name: read(module.weight, other).clone() for other in targets}
            new = torch.randn(target.shape)
            place(module.weight, target, new)
            for other in targets:
                expected = new if other is target else before[other.name]
                assert read(module.weight, other).equal(expected)


# MPNet's attention calls no attention function.
@pytest.mark.parametrize("name", [name for name in MODELS if not name.startswith("mpnet")])
def test_parts_are_what_attention_receives(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the split that the model itself makes, not this package's idea of the rows."""
    model = build(name)
    resolved = resolve(model)
    targets = {target.role: target for target in resolved.of_block(0)}
    inputs: list[torch.Tensor] = []
    first: Any = model.get_submodule(targets["q"].module)
    first.register_forward_pre_hook(lambda _module, args: inputs.append(args[0]))

    class Received(Exception):
        """Leaves the model as soon as its first attention is called."""

    def leave(_module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_args: Any, **_kwargs: Any) -> None:
        raise Received(q, k, v)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, model.config._attn_implementation, leave)
    with torch.no_grad(), pytest.raises(Received) as received:
        model(torch.tensor([[17]]))
    # At the first position rotary embeddings are the identity.
    for role, tensor in zip("qkv", received.value.args, strict=True):
        target = targets[role]
        module: Any = model.get_submodule(target.module)
        with torch.no_grad():
            expected = inputs[0] @ read(module.weight, target).T + (bias(module.bias, target) if target.bias else 0)
        heads = tensor[0, :, 0]
        if role != "v" and resolved.architecture.head_norms:
            continue
        if role == "q" and resolved.architecture.name == "opt":
            heads = heads * heads.shape[-1] ** 0.5
        # Some families rotate in float32, whatever they compute in.
        near = 1e-6 if resolved.architecture.name in ("cohere", "modernbert") else 1e-10
        torch.testing.assert_close(heads.flatten(), expected.flatten(), rtol=near, atol=near)


def test_gate_is_what_the_activation_sees() -> None:
    model = tiny_model("phi3", dtype=torch.float64)
    targets = {target.role: target for target in resolve(model).of_block(0)}
    mlp: Any = model.get_submodule("model.layers.0.mlp")
    x = torch.randn(3, 32, dtype=torch.float64)
    gate, up, down = (
        read(module.weight, targets[role])
        for module, role in ((mlp.gate_up_proj, "gate"), (mlp.gate_up_proj, "up"), (mlp.down_proj, "down"))
    )
    expected = (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T
    torch.testing.assert_close(mlp(x), expected, rtol=1e-12, atol=1e-12)


@given(st.integers(1, 4), st.integers(0, 3), st.integers(1, 4), st.integers(0, 3), st.integers(1, 4), st.booleans())
def test_read_is_row_selection(groups: int, offset: int, length: int, after: int, inner: int, conv1d: bool) -> None:
    rows = Rows(groups, offset + length + after, offset, length)
    view = View(rows, transposed=conv1d)
    target = Target("m:q", 0, "m.weight", view, "m.bias", "q", "qk", (rows.size, inner), "attn", None)
    whole = torch.arange(rows.total * inner, dtype=torch.float64).reshape(rows.total, inner)
    stored = whole.T.contiguous() if conv1d else whole
    assert read(stored, target).equal(whole[rows.index()])
    assert bias(whole[:, 0].contiguous(), target).equal(whole[rows.index(), 0])
    new = -torch.rand(target.shape, dtype=torch.float64)
    expected = whole.clone()
    expected[rows.index()] = new
    placed = place(stored.clone(), target, new)
    assert (placed.T if conv1d else placed).equal(expected)


@pytest.mark.parametrize("model_type", ["llama", "phi3", "gpt2", "gpt_neox"])
def test_meta_weights_and_dtypes(model_type: str) -> None:
    model = tiny_model(model_type, dtype=torch.bfloat16)
    for target in resolve(model).targets:
        weight: Any = model.get_submodule(target.module).weight
        part = read(weight.to("meta"), target)
        assert (part.shape, part.dtype, part.device.type) == (target.shape, torch.bfloat16, "meta")
        assert place(weight, target, torch.ones(target.shape, dtype=torch.float64)).dtype == torch.bfloat16


def test_wrong_shapes_are_named() -> None:
    target = resolve(tiny_model("gpt2")).targets[0]
    with pytest.raises(CheckpointError, match=r"c_attn\.weight has shape \(96, 32\); expected \(32, 96\)"):
        read(torch.zeros(96, 32), target)
    with pytest.raises(CheckpointError, match=r"c_attn:q has shape \(32, 31\); expected \(32, 32\)"):
        place(torch.zeros(32, 96), target, torch.zeros(32, 31))
    with pytest.raises(CheckpointError, match=r"c_attn\.bias has shape \(95,\); expected \(96,\)"):
        bias(torch.zeros(95), target)
    with pytest.raises(CheckpointError, match=r"c_attn:q has shape \(96,\); expected \(32,\)"):
        place_bias(torch.zeros(96), target, torch.zeros(96))
    with pytest.raises(CheckpointError, match=r"c_attn\.bias has shape \(32,\); expected \(96,\)"):
        place_bias(torch.zeros(32), target, torch.zeros(32))


@pytest.mark.parametrize("transposed", [False, True])
def test_one_expert_of_a_parameter_that_holds_several(transposed: bool) -> None:
    """Gate rows first, then up rows, for each of three experts."""
    stored = torch.arange(3 * 8 * 5, dtype=torch.float64).view(3, 8, 5)
    weight = stored.mT.contiguous() if transposed else stored.clone()
    for expert in range(3):
        for offset, role in ((0, "gate"), (4, "up")):
            view = View(Rows(1, 8, offset, 4), transposed, expert)
            target = Target(f"e.{expert}.{role}", 0, "e.gate_up", view, None, role, "experts", (4, 5), "mlp", None)
            assert read(weight, target).equal(stored[expert, offset : offset + 4])
            place(weight, target, -read(weight, target))
    assert weight.equal(-(stored.mT if transposed else stored))
    beyond = Target(
        "e.3", 0, "e.gate_up", View(Rows(1, 8, 0, 4), transposed, 3), None, "up", "experts", (4, 5), "", None
    )
    with pytest.raises(CheckpointError, match="more than 3 experts"):
        read(weight, beyond)
