"""What a format encodes is what the layer of that name, in the code that checkpoints carry, computes with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lowrank_compress.arch.resolve import resolve
from lowrank_compress.formats import dense
from lowrank_compress.formats.module import module_entry, module_tensors
from lowrank_compress.formats.spec import Encoded
from lowrank_compress.formats.table import FORMATS, choices_of, rebuild
from lowrank_compress.shipped import formats as layers
from lowrank_compress.shipped.config import LowRankConfig
from lowrank_compress.shipped.formats.table import FORMATS as LAYERS
from lowrank_compress.shipped.linear import CompressedLinear
from tests.formats.test_formats import product
from tests.tiny import tiny_model


def encodings(name: str, shape: tuple[int, int]) -> list[Encoded]:
    source = product(shape, torch.float32)
    return [FORMATS[name].encode(source, choice.parameters) for choice in choices_of(FORMATS[name], shape)]


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_a_layer_takes_every_choice_and_stands_for_the_same_matrix(name: str) -> None:
    model = tiny_model("llama")
    target = next(target for target in resolve(model).targets if target.role == "up")
    found = encodings(name, target.shape)
    assert found
    for part in found:
        entry = module_entry([target], [part])
        layer = CompressedLinear(**LowRankConfig({"x": entry}).modules["x"])
        layer.load_state_dict(module_tensors([target], [part], torch.float32), strict=True)
        torch.testing.assert_close(layer.dense_weight(torch.float64), rebuild(part), rtol=1e-5, atol=1e-6)


def test_fused_parts_of_all_formats_share_a_layer() -> None:
    targets = [target for target in resolve(tiny_model("phi3")).targets if target.block == 0 and target.role in "qkv"]
    assert [target.role for target in targets] == ["q", "k", "v"]
    whole = product(targets[1].shape, torch.float32).weight
    parts = [
        encodings("pivot", targets[0].shape)[3],
        dense.dense(whole.float()),
        encodings("pair", targets[2].shape)[2],
    ]
    layer = CompressedLinear(**LowRankConfig({"x": module_entry(targets, parts)}).modules["x"])
    layer.load_state_dict(module_tensors(targets, parts, torch.float32), strict=True)
    expected = torch.cat([rebuild(part) for part in parts])
    torch.testing.assert_close(layer.dense_weight(torch.float64), expected, rtol=1e-5, atol=1e-6)


def test_every_layer_has_a_file_of_its_name() -> None:
    folder = Path(layers.__file__).parent
    names = {name.replace("-", "_") for name in LAYERS}
    assert {path.stem for path in folder.glob("*.py")} == {"__init__", "base", "table", *names}
