"""Packed layers against arithmetic bit by bit, and against the package whose layout they have."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lowrank_compress.formats.packed import packed_bytes, packed_tensors
from lowrank_compress.linalg.quantize import Grid, Quantized, Scales
from lowrank_compress.shipped.config import LowRankConfig
from lowrank_compress.shipped.packed import PackedLinear, pack, packed_like, unpack

ALL_BITS = (2, 3, 4, 5, 6, 7, 8)


def some_codes(bits: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(bits)
    return torch.randint(-(1 << (bits - 1)), 1 << (bits - 1), shape, generator=generator)


def slowly(row: list[int], bits: int) -> list[int]:
    whole = sum((code + (1 << (bits - 1))) << (number * bits) for number, code in enumerate(row))
    words = [(whole >> (32 * word)) & 0xFFFFFFFF for word in range(-(-len(row) * bits // 32))]
    return [word - (1 << 32) if word >> 31 else word for word in words]


@pytest.mark.parametrize("bits", ALL_BITS)
def test_numbers_lie_one_behind_the_other(bits: int) -> None:
    for count in (1, 21, 64):
        codes = some_codes(bits, 3, count)
        words = pack(codes, bits)
        assert words.dtype == torch.int32
        assert words.tolist() == [slowly(row, bits) for row in codes.tolist()]
        assert torch.equal(unpack(words, bits, count), codes.int())


@pytest.mark.parametrize("bits", ALL_BITS)
def test_the_layout_is_that_of_compressed_tensors(bits: int) -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    codes = some_codes(bits, 5, 43).to(torch.int8)
    assert torch.equal(pack(codes, bits), helpers.pack_to_int32(codes, bits))
    assert torch.equal(pack(codes.mT, bits).mT, helpers.pack_to_int32(codes, bits, packed_dim=0))


def quantized(bits: int, symmetric: bool) -> Quantized:
    generator = torch.Generator().manual_seed(bits)
    scale = torch.randn(6, 3, generator=generator).bfloat16().double()
    zero = torch.zeros(6, 3).double() if symmetric else some_codes(bits, 6, 3).double()
    return Quantized(Scales(Grid(bits, 8, symmetric), scale, zero), some_codes(bits, 6, 24).double())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [3, 4])
def test_a_layer_computes_with_the_matrix_that_was_packed(bits: int, symmetric: bool) -> None:
    found = quantized(bits, symmetric)
    tensors = packed_tensors(found, torch.bfloat16)
    assert packed_bytes((6, 24), found.scales.grid, torch.bfloat16) == sum(t.nbytes for t in tensors.values())
    old = nn.Linear(24, 6)
    layer = packed_like("x", old, (bits, 8, symmetric))
    layer.load_state_dict({**tensors, "bias": old.bias.detach()})
    assert layer.weight_scale.dtype == torch.float32
    assert torch.equal(layer.dense().double(), found.matrix())
    assert torch.equal(layer.get_parameter("weight"), layer.dense())
    assert [name for name, _ in layer.named_parameters()] == ["bias"]
    x = torch.randn(2, 5, 24)
    assert torch.equal(layer(x), nn.functional.linear(x, found.matrix().float(), old.bias))
    assert torch.equal(layer.to(torch.bfloat16).dense(), found.matrix().bfloat16())


def test_what_cannot_be_packed_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a.b has 24 columns, which groups of 7 do not divide"):
        packed_like("a.b", nn.Linear(24, 6), (4, 7, True))
    with pytest.raises(ValueError, match=r"a.b of the low-rank config is a LayerNorm, expected nn.Linear"):
        packed_like("a.b", nn.LayerNorm(24), (4, 8, True))


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({"bits": 8}, "factor_quantization: expected the keys layout and linears, got {'bits': 8}"),
        ({"layout": "marlin", "linears": {}}, "the layout 'marlin', unknown to this code"),
        ({"layout": "pack-quantized", "linears": {"x": [9, 8, True]}}, r"linears\['x'\]: expected 2 to 8 bits"),
        ({"layout": "pack-quantized", "linears": {"x": [4, 0, True]}}, r"linears\['x'\]: expected 2 to 8 bits"),
        ({"layout": "pack-quantized", "linears": {"x": [4, 8, 1]}}, r"linears\['x'\]: expected symmetric or not"),
        ({"layout": "pack-quantized", "linears": {"x": [4, 8]}}, r"linears\['x'\]: expected bits, group and symm"),
    ],
)
def test_a_config_of_packed_layers_is_checked(found: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LowRankConfig(factor_quantization=found)


def test_a_config_with_packed_layers_is_of_version_5() -> None:
    packing = {"layout": "pack-quantized", "linears": {"x": [4, 8, True]}}
    assert LowRankConfig(factor_quantization=packing).to_dict()["version"] == 5
    assert LowRankConfig(**LowRankConfig(factor_quantization=packing).to_dict()).factor_quantization == packing


def test_it_says_what_it_is() -> None:
    assert "bits=4, group=8, asymmetric" in repr(PackedLinear(16, 4, False, 4, 8, False))
