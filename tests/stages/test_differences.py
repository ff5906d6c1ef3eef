"""Differences of tensors have the right numbers, for every dtype; reports may differ in fractions alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lowrank_compress.artifacts.contents import tensor_hash
from lowrank_compress.stages.description import fractions
from lowrank_compress.stages.differences import (
    Elements,
    Reference,
    compare_elements,
    file_differences,
    tensor_differences,
)
from lowrank_compress.stages.expectation import FileEntry, StageEntry, TensorEntry


def test_elements_of_a_known_difference():
    expected = torch.tensor([[1.0, 2.0, -4.0], [0.0, 5.0, 6.0]])
    found = expected.clone()
    found[0, 2], found[1, 0] = -5.0, 3.0
    norm = (1 + 9) ** 0.5 / (1 + 4 + 16 + 25 + 36) ** 0.5
    difference = compare_elements(expected, found)
    assert difference == Elements((0, 2), -4.0, -5.0, 2, 1.0, pytest.approx(norm))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int32, torch.int64])
def test_elements_of_every_dtype(dtype: torch.dtype):
    expected = torch.arange(6).view(2, 3).to(dtype)
    found = expected.clone()
    found[1, 1] = 8
    assert compare_elements(expected, found) == Elements((1, 1), 4.0, 8.0, 1, 0.5, pytest.approx(4 / 55**0.5))


def test_a_sign_of_zero_is_a_difference_of_bytes_alone():
    difference = compare_elements(torch.tensor([1.0, 0.0]), torch.tensor([1.0, -0.0]))
    assert (difference.index, difference.count, difference.largest, difference.norm) == ((1,), 1, 0.0, 0.0)


def test_a_scalar_has_no_index():
    assert compare_elements(torch.tensor(2.0), torch.tensor(3.0)).index == ()


def entry(tensor: torch.Tensor) -> TensorEntry:
    kind = str(tensor.dtype).removeprefix("torch.")
    return TensorEntry(dtype=kind, shape=list(tensor.shape), sha256=tensor_hash(tensor))


def test_each_kind_of_difference_is_named(tmp_path: Path):
    one = {"same": torch.ones(2), "gone": torch.ones(1), "wide": torch.ones(2, 3), "half": torch.ones(2)}
    two = {"same": torch.ones(2), "new": torch.ones(1), "wide": torch.ones(3, 2), "half": torch.ones(2).half()}
    save_file(two, tmp_path / "model.safetensors")
    expected = StageEntry(
        id="", files={}, tensors={name: entry(tensor) for name, tensor in one.items()}, environment={}
    )
    found = tensor_differences("model", expected, [tmp_path / "model.safetensors"], Reference({}))
    assert {each.tensor: each.problem for each in found} == {
        "gone": "missing",
        "new": "not expected",
        "wide": "float32 3×2, expected float32 2×3",
        "half": "float16 2, expected float32 2",
    }


def described(path: Path, value: object) -> dict[str, FileEntry]:
    path.write_text(json.dumps(value))
    parts = fractions(path)
    return {"report.json": FileEntry.model_validate({"sha256": json.dumps(value), "size": 0, **parts})}


@pytest.mark.parametrize(
    ("value", "state"),
    [
        ({"loss": 0.5, "rank": 3, "list": [1.0, {"deep": 2.5}]}, None),
        ({"loss": 0.5 * (1 + 5e-3), "rank": 3, "list": [1.0, {"deep": 2.5}]}, "other fractions"),
        ({"loss": 0.5 * (1 + 5e-2), "rank": 3, "list": [1.0, {"deep": 2.5}]}, "other bytes"),
        ({"loss": 0.5, "rank": 4, "list": [1.0, {"deep": 2.5}]}, "other bytes"),
        ({"loss": 0.5, "rank": 3, "list": [1.0, 2.5]}, "other bytes"),
        ({"loss": 0.5, "rank": 3, "list": [1.0, {"deep": 3}]}, "other bytes"),
    ],
)
def test_reports_may_differ_infractions_alone(tmp_path: Path, value: object, state: str | None):
    expected = described(tmp_path / "a.json", {"loss": 0.5, "rank": 3, "list": [1.0, {"deep": 2.5}]})
    found = described(tmp_path / "b.json", value)
    assert [each.state for each in file_differences("model", expected, found, 1e-4)] == ([state] if state else [])
    assert [each.state for each in file_differences("model", expected, found, None)] == (
        ["other bytes"] if state else []
    )
