"""What is written tensor by tensor is what safetensors writes at once."""

from __future__ import annotations

import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lowrank_compress.artifacts.stream import NAMES, Lazy, at_hand, write_tensors


def test_the_bytes_are_those_of_safetensors(tmp_path: Path):
    tensors = {f"b.{number}": torch.ones(3, dtype=dtype) for number, dtype in enumerate(NAMES)}
    tensors |= {'é"\n': torch.empty(0, 2), "scalar": torch.tensor(2.5), "Z": torch.randn(5, 7).to(torch.bfloat16)}
    tensors |= {"a": torch.randn(4, 3), "turned": torch.randn(6, 2).T.contiguous()}
    metadata = {"lrc": '{"x": "\\u00e9", "y": [1, 2]}'}
    save_file(tensors, tmp_path / "theirs", metadata)
    write_tensors(tmp_path / "ours", {name: at_hand(tensor) for name, tensor in tensors.items()}, metadata)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_one_tensor_is_read_at_a_time_and_written_whatever_its_layout(tmp_path: Path):
    lent: list[weakref.ref[np.ndarray]] = []

    def read() -> torch.Tensor:
        array = np.arange(6, dtype=np.float32)  # alive as long as what the tensor holds
        lent.append(weakref.ref(array))
        assert sum(one() is not None for one in lent) <= 2  # the one before goes when its name is given away
        return torch.from_numpy(array).view(2, 3).T

    write_tensors(tmp_path / "file", {name: Lazy((3, 2), torch.float32, read) for name in "cabd"}, {})
    found = load_file(tmp_path / "file")
    assert list(found) == ["a", "b", "c", "d"]
    assert all(torch.equal(tensor, torch.arange(6.0).view(2, 3).T) for tensor in found.values())
    assert len(lent) == 4


def test_a_tensor_that_is_not_what_was_announced_is_refused(tmp_path: Path):
    wrong = Lazy((2,), torch.float32, lambda: torch.zeros(2, dtype=torch.float64))
    with pytest.raises(ValueError, match="announced"):
        write_tensors(tmp_path / "file", {"a": wrong}, {})
