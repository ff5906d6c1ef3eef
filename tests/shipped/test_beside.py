"""What packed layers have beside their codes, against one multiplication after another."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowrank_compress.formats.packed import beside_bytes, packed_tensors
from lowrank_compress.shipped.beside import Beside, rounded_activations
from lowrank_compress.shipped.config import LowRankConfig
from lowrank_compress.shipped.packed import PackedLinear, packed_like
from tests.shipped.test_packed import quantized

COLUMNS = [3, 17]


def slowly(row: list[float], bits: int, group: int) -> list[float]:
    high, made = 2 ** (bits - 1) - 1, []
    for start in range(0, len(row), group):
        part = row[start : start + group]
        scale = max(abs(value) for value in part) / high
        made += [round(value / scale) * scale if scale else 0.0 for value in part]
    return made


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_activations_are_rounded_token_by_token(bits: int) -> None:
    x = torch.randn(2, 3, 24, generator=torch.Generator().manual_seed(bits)).double()
    x[0, 1, 8:16] = 0
    for group in (8, 24):
        found = rounded_activations(x, bits, group).flatten(0, 1)
        expected = torch.tensor([slowly(row, bits, group) for row in x.flatten(0, 1).tolist()]).double()
        assert torch.allclose(found, expected, atol=1e-12)
        assert (found != x.flatten(0, 1)).any()
    half = x.bfloat16()
    assert rounded_activations(half, bits, 8).dtype == torch.bfloat16
    x.requires_grad_()
    rounded_activations(x, bits, 8).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.ones_like(x))


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16().double()


def layer_of(beside: Beside) -> tuple[PackedLinear, dict[str, Tensor], nn.Linear]:
    """A layer of 6 by 24, the tensors that it was loaded from, and the one in whose place it is."""
    found = quantized(4, True)
    more = {"weight_outer": drawn(6, beside.rank), "weight_inner": drawn(beside.rank, 24, seed=1)}
    more |= {"weight_outliers": drawn(6, 2, seed=2), "weight_columns": torch.tensor(COLUMNS, dtype=torch.int32)}
    more["weight_smooth"] = drawn(24, seed=3).abs() + 0.5
    own = {name: more[name] for name in beside.buffers(6, 24, None)}
    old = nn.Linear(24, 6)
    layer = packed_like("x", old, (4, 8, True, beside.entry))
    layer.load_state_dict({**packed_tensors(found, torch.bfloat16), **own, "bias": old.bias.detach()})
    stored = {name: each if name == "weight_columns" else each.bfloat16() for name, each in own.items()}
    assert beside_bytes((6, 24), beside, torch.bfloat16) == sum(each.nbytes for each in stored.values())
    return layer, {**own, "codes": found.matrix()}, old


@pytest.mark.parametrize("bits", [0, 4])
@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize(("rank", "outliers"), [(0, 0), (3, 0), (0, 2), (3, 2)])
def test_a_layer_is_the_sum_of_its_products(rank: int, outliers: int, smooth: bool, bits: int) -> None:
    beside = Beside(rank, outliers, smooth, bits)
    if not beside.entry:
        return
    layer, own, old = layer_of(beside)
    x = torch.randn(5, 24, generator=torch.Generator().manual_seed(9))
    met, weight = x.double(), own["codes"].clone()
    if smooth:
        met, weight = met / own["weight_smooth"], weight / own["weight_smooth"]
    if outliers:
        met[:, COLUMNS] = 0
        weight[:, COLUMNS] = own["weight_outliers"]
    if bits:
        met = torch.tensor([slowly(row, bits, 8) for row in met.float().tolist()]).double()
    expected = met @ own["codes"].mT + old.bias.double()
    if rank:
        expected += x.double() @ (own["weight_outer"] @ own["weight_inner"]).mT
        weight += own["weight_outer"] @ own["weight_inner"]
    if outliers:
        expected += x[:, COLUMNS].double() @ own["weight_outliers"].mT
    assert torch.allclose(layer(x).double(), expected, atol=1e-4)
    assert torch.allclose(layer.dense().double(), weight, atol=1e-5)
    dense = nn.functional.linear(x, layer.weight, layer.bias)
    assert torch.allclose(layer(x), dense, atol=1e-4) == (bits == 0)
    assert all(f"{name}={value}" in repr(layer) for name, value in beside.entry.items())


def test_its_tensors_survive_a_change_of_dtype() -> None:
    layer, own, _ = layer_of(Beside(3, 2, True, 8))
    layer.to(torch.bfloat16)
    assert layer.weight_columns.tolist() == COLUMNS
    assert torch.equal(layer.get_buffer("weight_outer").double(), own["weight_outer"])


def test_columns_must_be_columns() -> None:
    layer, _, _ = layer_of(Beside(outliers=2))
    layer.check("x")
    for wrong in ([3, 3], [17, 3], [3, 24], [-1, 3]):
        layer.weight_columns = torch.tensor(wrong, dtype=torch.int32)
        with pytest.raises(ValueError, match=r"x.weight_columns does not name distinct rows of 24"):
            layer.check("x")


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({}, "expected some of rank, outliers, smooth, activation_bits, got {}"),
        ({"width": 3}, "expected some of rank, outliers, smooth, activation_bits, got {'width': 3}"),
        ([3], r"expected some of rank, outliers, smooth, activation_bits, got \[3\]"),
        ({"rank": -1}, "rank cannot be -1"),
        ({"rank": True}, "rank cannot be True"),
        ({"smooth": 1}, "smooth cannot be 1"),
        ({"activation_bits": 9}, "expected activations of 2 to 8 bits, got 9"),
        ({"activation_bits": 0}, "expected activations of 2 to 8 bits, got 0"),
    ],
)
def test_a_config_is_checked(found: Any, message: str) -> None:
    with pytest.raises(ValueError, match=rf"linears\['x'\]: {message}"):
        LowRankConfig(factor_quantization={"layout": "pack-quantized", "linears": {"x": [4, 8, True, found]}})


def test_a_config_with_it_is_of_version_8_and_repeats() -> None:
    packing = {"layout": "pack-quantized", "linears": {"x": [4, 8, True], "y": [4, 8, True, {"rank": 3}]}}
    config = LowRankConfig(factor_quantization=packing)
    assert config.to_dict()["version"] == 8
    assert LowRankConfig(**config.to_dict()).factor_quantization == packing


def test_what_is_larger_than_the_layer_is_refused() -> None:
    for beside in ({"rank": 7}, {"outliers": 25}):
        with pytest.raises(ValueError, match=rf"x is \(6, 24\), too small for {beside}"):
            packed_like("x", nn.Linear(24, 6), (4, 8, True, beside))
