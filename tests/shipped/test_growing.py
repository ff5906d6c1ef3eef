"""A product added to a compressed layer: exact, in the format that it has, a rank higher."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lowrank_compress.shipped.formats.table import FORMATS
from lowrank_compress.shipped.growing import grown
from lowrank_compress.shipped.linear import CompressedLinear
from tests.shipped.test_linear import LAYOUTS, fill, layer, weight_by_loops

torch.set_num_threads(1)


def product(m: int, n: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    left, right = torch.randn(m, rank, generator=generator), torch.randn(rank, n, generator=generator)
    return left.double(), right.double()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_weight_is_the_sum(layout: str) -> None:
    before = layer(layout, bias=True)
    kept = {name: tensor.clone() for name, tensor in before.state_dict().items()}
    left, right = product(before.out_features, before.in_features, 2)
    after = grown(before, left, right, bias=torch.ones(before.out_features))
    torch.testing.assert_close(weight_by_loops(after), weight_by_loops(before) + left @ right, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(after.bias, before.bias + 1)
    x = torch.randn(3, before.in_features, dtype=torch.float64)
    torch.testing.assert_close(after(x), before(x) + x @ right.T @ left.T + 1, rtol=1e-9, atol=1e-9)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in before.state_dict().items())
    # What the config says is enough to build it.
    CompressedLinear(**after.entry, dtype=torch.float64).load_state_dict(after.state_dict())


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "latent"])  # which stores nothing
def test_every_format_keeps_itself_where_it_pays(name: str) -> None:
    m, n = 40, 30
    entry = FORMATS[name].describe(m, n, *([5] if FORMATS[name].parameters else []))
    before = CompressedLinear(n, m, False, [entry], dtype=torch.float64)
    fill(before)
    left, right = product(m, n, 3)
    after = grown(before, left, right)
    expected: dict[str, Any] = dict(entry, rank=8) if name != "dense" else entry
    assert after.entries == [expected]
    torch.testing.assert_close(after.dense_weight(), before.dense_weight() + left @ right, rtol=1e-9, atol=1e-9)
    most = grown(before, *product(m, n, 25))
    assert [part["format"] for part in most.entries] == ["dense"]


def test_a_core_stays_between_orthonormal_factors() -> None:
    before = CompressedLinear(30, 40, False, [{"rows": 40, "format": "svd-core", "rank": 5}], dtype=torch.float64)
    fill(before)
    after: Any = grown(before, *product(40, 30, 3))
    inner, outer = after.lr_in.weight, after.lr_out.weight
    torch.testing.assert_close(inner @ inner.T, torch.eye(8, dtype=torch.float64))
    torch.testing.assert_close(outer.T @ outer, torch.eye(8, dtype=torch.float64))


def test_nothing_added_to_pivots_keeps_them_finite() -> None:
    """An adapter that was never trained is zero: the rows that join the pivots are combinations already."""
    before = CompressedLinear(30, 40, False, [{"rows": 40, "format": "pivot", "rank": 5}], dtype=torch.float64)
    fill(before)
    left, right = product(40, 30, 3)
    after = grown(before, 0 * left, right)
    torch.testing.assert_close(after.dense_weight(), before.dense_weight(), rtol=1e-9, atol=1e-9)


def test_what_is_not_in_memory_is_refused() -> None:
    empty = CompressedLinear(30, 40, False, [{"rows": 40, "format": "pair", "rank": 5}], device="meta")
    with pytest.raises(ValueError, match="not in memory: load the model without offloading"):
        grown(empty, *product(40, 30, 3))
