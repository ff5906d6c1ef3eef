from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lowrank_compress.shipped.config import LowRankConfig
from lowrank_compress.shipped.linear import CompressedLinear, Stock
from lowrank_compress.shipped.restore import restore_modules
from lowrank_compress.shipped.swap import swap_modules
from tests.shipped.test_linear import entry, fill

torch.set_num_threads(1)


class Base(nn.Module):
    base_model_prefix = "base"

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.up = nn.Linear(10, width, bias=False)
        self.down = Conv1D(10, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x)))


class Head(nn.Module):
    base_model_prefix = "base"

    def __init__(self) -> None:
        super().__init__()
        self.base = Base()
        self.norm = nn.LayerNorm(10)


def conv_entry() -> dict[str, Any]:
    part = {"rows": 10, "format": "pivot", "rank": 3}
    return {"in_features": 12, "out_features": 10, "bias": True, "heads": 1, "parts": [part]}


@pytest.mark.parametrize("saved", ["base.", ""])
@pytest.mark.parametrize("built", [Base, Head])
def test_swap_finds_modules_with_or_without_the_prefix(built: type, saved: str) -> None:
    state = torch.get_rng_state()
    with torch.device("meta"):
        model = built()
    model.half()
    swap_modules(model, LowRankConfig({f"{saved}up": entry("pivot"), f"{saved}down": conv_entry()}))
    base = model.base if built is Head else model
    assert isinstance(base.up, CompressedLinear)
    assert isinstance(base.down, CompressedLinear)
    assert base.up.stock == Stock(12, 10, False, False)
    assert base.down.stock == Stock(10, 12, True, True)
    assert {t.device.type for t in base.state_dict().values()} == {"meta"}
    assert {t.dtype for t in base.parameters()} == {torch.float16}
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        (
            {"base.gate": "pair"},
            "names the module base.gate, which Head does not have, with or without the prefix 'base'",
        ),
        ({"norm": "pair"}, "norm of the low-rank config is a LayerNorm, expected nn.Linear or Conv1D"),
        ({"base.up": "fused mix"}, r"base.up is \(12, 10\) .* in the model, but \(24, 10\)"),
    ],
)
def test_swap_refuses(modules: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        swap_modules(Head(), LowRankConfig({path: entry(layout) for path, layout in modules.items()}))


def test_restore_is_the_inverse_of_swap() -> None:
    model = Base().double()
    swap_modules(model, LowRankConfig({"up": entry("pivot"), "down": conv_entry()}))
    fill(model)
    x = torch.randn(4, 10, dtype=torch.float64)
    expected = model(x)
    restore_modules(model)
    assert type(model.up) is nn.Linear
    assert type(model.down) is Conv1D
    assert {name: value.shape for name, value in model.state_dict().items()} == {
        name: value.shape for name, value in Base().state_dict().items()
    }
    torch.testing.assert_close(model(x), expected)


def test_smaller_dense_and_smaller_factorized_modules_are_padded_back() -> None:
    model = Base().double()
    shapes = {"up": [8, 10], "down": [10, 8]}
    swap_modules(model, LowRankConfig({"down": {**conv_entry(), "in_features": 8}}, shapes))
    assert type(model.up) is nn.Linear
    assert model.up.weight.shape == (8, 10)
    fill(model)
    x = torch.randn(4, 10, dtype=torch.float64)
    expected = model(x)
    restore_modules(model)
    assert model.up.weight.shape == (12, 10)
    assert type(model.down) is Conv1D
    assert model.down.weight.shape == (12, 10)
    torch.testing.assert_close(model(x), expected)


def test_smaller_conv1d() -> None:
    model = Base().double()
    swap_modules(model, LowRankConfig({}, {"up": [8, 10], "down": [10, 8]}))
    assert type(model.down) is Conv1D
    assert model.down.weight.shape == (8, 10)
    fill(model)
    x = torch.randn(4, 10, dtype=torch.float64)
    expected = model(x)
    restore_modules(model)
    torch.testing.assert_close(model(x), expected)


def test_restore_refuses_a_bias_without_a_place_and_weights_elsewhere() -> None:
    model = Base()
    swap_modules(model, LowRankConfig({"up": entry("pair", bias=True)}))
    with pytest.raises(ValueError, match="up has a bias of its own, which a stock Base has no place for"):
        restore_modules(model)
    model = Base()
    swap_modules(model, LowRankConfig({"up": entry("pair")}))
    with pytest.raises(ValueError, match="the weights of up are not in memory"):
        restore_modules(model.to("meta"))
    assert isinstance(model.up, CompressedLinear)
