from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lowrank_compress.calibration.capture import capture, state_bytes
from lowrank_compress.config import Scheme
from lowrank_compress.methods.sites import all_units, sites_of
from lowrank_compress.methods.units import needed
from lowrank_compress.model.checkpoint import Checkpoint
from lowrank_compress.model.replay import Batch
from lowrank_compress.model.skeleton import Skeleton
from lowrank_compress.model.states import StateStore, free_memory
from tests.tiny import save_tiny


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_spilled_states_are_the_same_and_leave_no_file(tmp_path: Path, dtype: torch.dtype) -> None:
    states = torch.randn(2, 3, 5, dtype=dtype)
    kept = StateStore(spill=True, directory=tmp_path).keep(states)
    assert list(tmp_path.iterdir()) == []
    assert torch.equal(kept, states)
    states += 1
    assert not torch.equal(kept, states)


def test_states_in_memory_are_the_tensors_themselves() -> None:
    states = torch.randn(2, 3, 5, requires_grad=True)
    kept = StateStore().keep(states)
    assert kept.data_ptr() == states.data_ptr()
    assert not kept.requires_grad


@pytest.mark.parametrize("method", ["svd-llm", "kfac"])
def test_where_states_lie_changes_no_bit(tmp_path: Path, method: str) -> None:
    skeleton = Skeleton(Checkpoint(save_tiny("llama", tmp_path / "model")), torch.device("cpu"), torch.float32)
    batches = [Batch(torch.randint(4, 96, (2, 16), generator=torch.Generator().manual_seed(i))) for i in range(3)]
    scheme = Scheme(qk=method, vo=method, mlp=method, metric="gram")
    wanted = needed(all_units(sites_of(skeleton.resolved, scheme)))
    place = tmp_path / "states"
    place.mkdir()

    def measured(memory: int) -> list[dict[str, torch.Tensor]]:
        found = capture(skeleton, batches, wanted, skip=lambda block: False, memory=memory, spill_to=place)
        return [statistics.means for statistics in found]

    enough = state_bytes(skeleton, batches, wanted)
    for in_memory, spilled in zip(measured(enough), measured(enough - 1), strict=True):
        assert in_memory.keys() == spilled.keys()
        assert all(torch.equal(in_memory[name], spilled[name]) for name in in_memory)
    assert list(place.iterdir()) == []


def test_what_is_free_is_a_share_of_what_there_is() -> None:
    assert 1 << 20 < free_memory() < 1 << 50
