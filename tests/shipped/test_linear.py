from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from lowrank_compress.shipped.linear import CompressedLinear

torch.set_num_threads(1)

PAIR, PIVOT, DENSE = "pair", "pivot", "dense"
# rows, format, rank of each part, and the heads they are interleaved over
LAYOUTS: dict[str, tuple[int, list[tuple[int, str, int]]]] = {
    "pair": (1, [(12, PAIR, 5)]),
    "pivot": (1, [(12, PIVOT, 5)]),
    "pivot of rank one": (1, [(12, PIVOT, 1)]),
    "pivot but one row": (1, [(12, PIVOT, 11)]),
    "fused pairs": (1, [(12, PAIR, 5), (6, PAIR, 3), (6, PAIR, 1)]),
    "fused mix": (1, [(12, PIVOT, 5), (6, DENSE, 6), (6, PAIR, 3)]),
    "dense": (1, [(12, DENSE, 12)]),
    "fused dense": (1, [(12, DENSE, 12), (6, DENSE, 6)]),
    "interleaved pairs": (2, [(12, PAIR, 5), (12, PAIR, 3), (12, PAIR, 4)]),
    "interleaved mix": (3, [(12, PIVOT, 5), (6, DENSE, -1), (9, PIVOT, 3)]),
    "interleaved one part": (4, [(12, PIVOT, 5)]),
}


def entry(layout: str, bias: bool = False, in_features: int = 10) -> dict[str, Any]:
    heads, parts = LAYOUTS[layout]
    return {
        "in_features": in_features,
        "out_features": sum(rows for rows, _, _ in parts),
        "bias": bias,
        "heads": heads,
        "parts": [{"rows": rows, "format": form, "rank": rank} for rows, form, rank in parts],
    }


def fill(module: nn.Module, seed: int = 0) -> nn.Module:
    """Random factors; pivot rows that are not the first ones."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    for layer in module.modules():
        if isinstance(layer, CompressedLinear):
            state = {
                f"lr_index{part.suffix}": torch.randperm(part.rows, generator=generator)[: part.width].sort().values
                for part in layer.parts
                if part.format == PIVOT
            }
            layer.load_state_dict(state, strict=False)
    return module


def layer(layout: str, bias: bool = False, dtype: torch.dtype = torch.float64) -> CompressedLinear:
    module = CompressedLinear(**entry(layout, bias), dtype=dtype)
    fill(module)
    return module


def weight_by_loops(module: CompressedLinear) -> torch.Tensor:
    """Each row of the weight, put where it belongs one at a time."""
    weight = torch.full((module.out_features, module.in_features), torch.nan, dtype=torch.float64)
    state = {name: value.double() for name, value in module.state_dict().items()}
    start, offset = 0, 0
    for part in module.parts:
        b = state["lr_in.weight"][start : start + part.width]
        start += part.width
        if part.format == PAIR:
            rows = list(state[f"lr_out{part.suffix}.weight"] @ b)
        elif part.format == DENSE:
            rows = list(b)
        else:
            pivots = [int(i) for i in state[f"lr_index{part.suffix}"]]
            others = iter(state[f"lr_out{part.suffix}.weight"] @ b)
            rows = [b[pivots.index(i)] if i in pivots else next(others) for i in range(part.rows)]
        size = part.rows // module.heads
        for i, row in enumerate(rows):
            weight[(i // size) * (module.out_features // module.heads) + offset + i % size] = row
        offset += size
    return weight


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_forward_and_dense_weight_equal_the_weight_built_row_by_row(layout: str, bias: bool) -> None:
    module = layer(layout, bias)
    reference = weight_by_loops(module)
    torch.testing.assert_close(module.dense_weight(), reference, rtol=1e-13, atol=1e-13)
    for shape in [(10,), (1, 10), (2, 7, 10), (0, 10)]:
        x = torch.randn(shape, dtype=torch.float64)
        torch.testing.assert_close(module(x), nn.functional.linear(x, reference, module.bias), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bfloat16(layout: str) -> None:
    module = layer(layout, True, torch.bfloat16)
    dense = module.dense_weight()
    assert dense.dtype == torch.bfloat16
    torch.testing.assert_close(dense.double(), weight_by_loops(module), rtol=2**-8, atol=1e-6)
    x = torch.randn(5, 10, dtype=torch.bfloat16)
    exact = nn.functional.linear(x.double(), weight_by_loops(module), module.get_parameter("bias").double())
    torch.testing.assert_close(module(x).double(), exact, rtol=0.05, atol=0.25)


def test_the_product_of_half_precision_factors_is_rounded_once() -> None:
    module = layer("pair", dtype=torch.bfloat16)
    wide = module.dense_weight(torch.float32)
    assert wide.dtype == torch.float32
    torch.testing.assert_close(wide.double(), weight_by_loops(module), rtol=1e-5, atol=1e-5)
    assert torch.equal(wide.bfloat16(), module.dense_weight())


@pytest.mark.parametrize("layout", ["pivot", "fused mix", "interleaved mix"])
def test_gradients_equal_those_of_the_dense_layer(layout: str) -> None:
    module = layer(layout, True)
    x = torch.randn(4, 10, dtype=torch.float64, requires_grad=True)
    with torch.inference_mode():
        module(x)
    assert torch.autograd.gradcheck(module, (x,))
    module(x).square().sum().backward()
    gradients = {name: p.grad for name, p in module.named_parameters()}
    assert all(g is not None and g.abs().sum() > 0 for g in gradients.values())
    assert set(gradients) == set(dict(module.named_parameters()))


def test_casts_leave_the_indices_alone() -> None:
    module = layer("fused mix")
    index = module.get_buffer("lr_index_0").clone()
    for cast in (module.bfloat16, module.half, module.float):
        cast()
        assert module.get_buffer("lr_index_0").dtype == torch.int32
        assert torch.equal(module.get_buffer("lr_index_0"), index)
        assert module.weight.dtype == module.lr_in.get_parameter("weight").dtype


def test_new_indices_replace_the_remembered_order() -> None:
    module, other = layer("pivot"), layer("pivot")
    fill(other, seed=1)
    x = torch.randn(3, 10, dtype=torch.float64)
    before = module(x)
    module.load_state_dict(other.state_dict())
    assert torch.equal(module(x), other(x))
    assert not torch.equal(module(x), before)
    module.load_state_dict(layer("pivot").state_dict(), assign=True)
    assert torch.equal(module(x), before)


def test_the_order_survives_casts_and_not_to_empty() -> None:
    module = layer("fused mix")
    module.remember_order()
    order = module._order
    assert order is not None
    assert module.half()._order is order
    module.to_empty(device="cpu")
    assert module._order is None or torch.equal(module._order, order)
    unordered = layer("fused pairs")
    unordered.remember_order()
    assert unordered._order is None


def test_meta_and_back() -> None:
    module = layer("interleaved mix", True)
    x = torch.randn(3, 10, dtype=torch.float64)
    expected, state = module(x), copy.deepcopy(module.state_dict())
    module.to("meta")
    assert module._order is None
    assert module(x.to("meta")).shape == expected.shape
    module.load_state_dict(state, assign=True)
    assert torch.equal(module(x), expected)


def test_state_holds_exactly_the_agreed_names() -> None:
    assert set(layer("pivot", True).state_dict()) == {"lr_in.weight", "lr_out.weight", "lr_index", "bias", "weight"}
    assert {name: tuple(value.shape) for name, value in layer("fused mix").state_dict().items()} == {
        "lr_in.weight": (14, 10),
        "lr_out_0.weight": (7, 5),
        "lr_index_0": (5,),
        "lr_out_2.weight": (6, 3),
        "weight": (0,),
    }


@pytest.mark.parametrize("layout", ["pair", "pivot", "fused mix", "interleaved mix"])
def test_compiles_to_one_graph(layout: str) -> None:
    torch._dynamo.reset()
    x = torch.randn(3, 10, dtype=torch.float64)
    for warm in (False, True):
        module = layer(layout, True)
        if warm:
            module(x)
        compiled = torch.compile(module, fullgraph=True, backend="eager")
        y = compiled(x)
        assert warm or module._order is None  # a graph's own tensors may not outlive it
        torch.testing.assert_close(y, module(x))
    module = layer(layout, True)
    program = torch.export.export(module, (x,))
    assert module._order is None
    torch.testing.assert_close(program.module()(x), module(x))


def test_repr_shows_the_parts() -> None:
    assert "bias=True, parts=12:pivot:5, 6:dense:6, 6:pair:3" in repr(layer("fused mix", True))
