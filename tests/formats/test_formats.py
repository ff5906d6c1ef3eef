"""What every storage format of the table must be: counted right, invertible, and as lossy as it says."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lowrank_compress.errors import InputError
from lowrank_compress.formats.spec import Product
from lowrank_compress.formats.table import FORMATS, choices_of, cost_of, rebuild
from lowrank_compress.linalg.metric import Identity
from lowrank_compress.linalg.weighted import decompose, smaller_side

SHAPES = [(1, 1), (1, 7), (5, 8), (8, 8), (8, 5), (30, 4)]
every_format = pytest.mark.parametrize("name", sorted(FORMATS))


def product(shape: tuple[int, int], dtype: torch.dtype = torch.float64, decay: float = 0.5) -> Product:
    """A random matrix whose singular values fall by a factor, and its basis."""
    generator = torch.Generator().manual_seed(0)
    small = min(shape)
    left, right = (
        torch.linalg.qr(torch.randn(size, small, dtype=torch.float64, generator=generator)).Q for size in shape
    )
    weight = left * decay ** torch.arange(small, dtype=torch.float64) @ right.mT
    form = weight @ weight.mT if smaller_side(shape) == "out" else weight.mT @ weight
    ones = torch.ones(shape[0], dtype=torch.float64), torch.ones(shape[1], dtype=torch.float64)
    return Product("w", weight, decompose(form, Identity()), ones, dtype)


@every_format
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("multiple", [1, 3])
def test_choices_pay_and_cost_what_is_stored(name: str, shape: tuple[int, int], multiple: int) -> None:
    choices, source = choices_of(FORMATS[name], shape, multiple), product(shape)
    assert (np.diff(choices.stored) >= 0).all()
    assert (choices.stored < shape[0] * shape[1]).all()
    for number, choice in enumerate(choices):
        part = FORMATS[name].encode(source, choice.parameters)
        tensors = [part.inner, *part.others.values()]
        stored = sum(tensor.numel() for tensor in tensors)
        indices = sum(tensor.numel() for tensor in tensors if not tensor.is_floating_point())
        assert cost_of(FORMATS[part.format], shape, part.parameters) == (stored, indices)
        assert stored <= choices.stored[number] == cost_of(FORMATS[name], shape, choice.parameters)[0]
        assert indices <= choices.indices[number] == cost_of(FORMATS[name], shape, choice.parameters)[1]


@every_format
@pytest.mark.parametrize("shape", [(5, 8), (8, 8), (12, 5)], ids=str)
def test_what_is_rebuilt_loses_what_was_said(name: str, shape: tuple[int, int]) -> None:
    choices, source = choices_of(FORMATS[name], shape), product(shape)
    said = FORMATS[name].losses(source.projector.tail().numpy(), choices.parameters)
    for choice, loss in zip(choices, said, strict=True):
        part = FORMATS[name].encode(source, choice.parameters)
        lost = float((rebuild(part) - source.weight).square().sum())
        # Of several formats the best is taken, which may have a larger rank at the same cost.
        assert lost <= loss + 1e-12
        if part.format == name:
            assert lost == pytest.approx(loss, rel=1e-6, abs=1e-12)
        approximate = FORMATS[name].approximate(source, choice.parameters)
        assert float((approximate - source.weight).square().sum()) == pytest.approx(loss, rel=1e-6, abs=1e-12)


@every_format
def test_tensors_have_the_dtype_asked_for(name: str) -> None:
    source = product((8, 12), torch.bfloat16)
    for choice in choices_of(FORMATS[name], (8, 12)):
        part = FORMATS[name].encode(source, choice.parameters)
        assert all(
            tensor.dtype == torch.bfloat16
            for tensor in (part.inner, *part.others.values())
            if tensor.is_floating_point()
        )
        assert part.shape == (8, 12)


@every_format
def test_every_format_says_what_it_leaves_open(name: str) -> None:
    format = FORMATS[name]
    assert format.name == name
    assert format.help
    assert format.grid((9, 7), 1).shape[1] == len(format.parameters)


def test_costs_are_those_of_the_papers() -> None:
    assert cost_of(FORMATS["pair"], (5, 8), (2,)) == (2 * 13, 0)
    assert cost_of(FORMATS["pivot"], (5, 8), (2,)) == (2 * 11 + 2, 2)
    assert cost_of(FORMATS["auto"], (5, 8), (2,)) == (2 * 11 + 2, 2)


def test_unknown_storage() -> None:
    with pytest.raises(InputError, match=r"Unknown storage 'pivots'\. Did you mean 'pivot'"):
        FORMATS["pivots"]
