from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from lowrank_compress.calibration.capture import boundaries, capture
from lowrank_compress.config import Scheme
from lowrank_compress.methods.candidates import all_groups, candidates_of
from lowrank_compress.methods.groups import needed
from lowrank_compress.model.checkpoint import Checkpoint
from lowrank_compress.model.skeleton import Skeleton
from lowrank_compress.model.walk.batch import Batch
from lowrank_compress.model.walk.segments import boundary_bytes, segment_length
from lowrank_compress.model.walk.states import StateStore
from lowrank_compress.resources.resources import Resources
from tests.tiny import save_tiny


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_spilled_states_are_the_same_and_leave_no_file(tmp_path: Path, dtype: torch.dtype) -> None:
    store = StateStore(spill=True, directory=tmp_path)
    states = [torch.randn(2, 3, size, dtype=dtype) for size in (5, 4, 5)]
    kept = [store.keep(each.mT) for each in states]  # not contiguous
    assert list(tmp_path.iterdir()) == []
    for state, each in zip(kept, states, strict=True):
        assert torch.equal(state.load(), each.mT)
        state.load().zero_()
        assert torch.equal(state.load(), each.mT)


def test_the_place_of_states_nobody_refers_to_is_used_again(tmp_path: Path) -> None:
    store = StateStore(spill=True, directory=tmp_path / "made")
    kept = [store.keep(torch.full((4, 8), float(i))) for i in range(3)]
    assert store._file is not None
    size = os.fstat(store._file.fileno()).st_size
    for i in range(10):
        kept[1] = store.keep(torch.full((4, 8), float(i)))
    assert os.fstat(store._file.fileno()).st_size <= size + 4 * 8 * 4
    assert [float(state.load()[0, 0]) for state in kept] == [0, 9, 2]


def test_states_in_memory_are_the_tensors_themselves() -> None:
    states = torch.randn(2, 3, 5, requires_grad=True)
    kept = StateStore().keep(states).load()
    assert kept.data_ptr() == states.data_ptr()
    assert not kept.requires_grad


@pytest.mark.parametrize("method", ["svd-llm", "kfac"])
def test_where_states_lie_changes_no_bit(tmp_path: Path, method: str) -> None:
    skeleton = Skeleton(Checkpoint(save_tiny("llama", tmp_path / "model")), torch.device("cpu"), torch.float32)
    batches = [Batch(torch.randint(4, 96, (2, 16), generator=torch.Generator().manual_seed(i))) for i in range(3)]
    scheme = Scheme(qk=method, vo=method, mlp=method, metric="gram")
    wanted = needed(all_groups(candidates_of(skeleton.resolved, scheme)))
    place = tmp_path / "states"
    place.mkdir()

    def measured(memory: int, disk: int) -> list[dict[str, torch.Tensor]]:
        resources = Resources(2 * memory)
        found = capture(
            skeleton, batches, wanted, skip=lambda block: False, resources=resources, disk=disk, spill_to=place
        )
        return [statistics.means for statistics in found]

    boundary = boundary_bytes(skeleton, batches)
    enough = boundary * boundaries(len(skeleton.blocks), wanted)
    reference = measured(enough, 0)
    for memory, disk in ((enough - 1, enough), (0, enough - boundary), (0, 0)):
        for found, expected in zip(measured(memory, disk), reference, strict=True):
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[name], expected[name]) for name in found)
    assert list(place.iterdir()) == []


@pytest.mark.parametrize(
    ("limit", "expected"), [(100, 1), (34, 1), (33, 2), (19, 2), (18, 3), (14, 4), (12, 4), (0, 4)]
)
def test_segments_of_thirty_two_blocks(limit: int, expected: int) -> None:
    assert segment_length(32, limit) == expected
