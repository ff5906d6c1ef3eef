"""Experts whose weights are in memory while they run alone: the same statistics, and never those of two."""

from __future__ import annotations

import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lowrank_compress.calibration.capture import capture
from lowrank_compress.model.checkpoint import Checkpoint
from lowrank_compress.model.skeleton import Skeleton
from lowrank_compress.model.walk.batch import Batch
from tests.moe import moe_model
from tests.ordinary import tokens

WANTED = {
    "gate": {"in_gram", "in_fisher"},
    "up": {"out_fisher"},
    "down": {"in_gram", "out_fisher", "routed_norm", "likeness"},
}


class Counting(Skeleton):
    """Counts the matrices of experts that are in memory."""

    alive, most = 0, 0

    def _read(self, name: str) -> Tensor:
        tensor = super()._read(name)
        if ".experts." in name:
            Counting.alive += 1
            Counting.most = max(Counting.most, Counting.alive)
            weakref.finalize(tensor.untyped_storage(), self._gone)
        return tensor

    @staticmethod
    def _gone() -> None:
        Counting.alive -= 1


@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize("gradients", [True, False])
def test_statistics_are_the_same_to_the_last_bit(model_type: str, gradients: bool, tmp_path: Path) -> None:
    moe_model(model_type).save_pretrained(tmp_path)
    batches = [Batch(torch.stack(tokens(11, 11))), Batch(torch.stack(tokens(9)))]
    found, most = [], []
    for room in (None, 0):
        skeleton = Counting(Checkpoint(tmp_path), torch.device("cpu"), torch.float32, for_experts=room)
        Counting.most = Counting.alive
        wanted = {
            target.name: frozenset(name for name in WANTED[target.role] if gradients or not name.endswith("fisher"))
            for target in skeleton.resolved.targets
            if target.expert is not None
        }
        blocks = capture(skeleton, batches, wanted, skip=lambda block: False)
        found.append({block.block: block.means for block in blocks})
        most.append(Counting.most)
    whole, lent = found
    assert whole.keys() == lent.keys()
    for block, means in whole.items():
        assert means.keys() == lent[block].keys()
        assert all(torch.equal(mean, lent[block][key]) for key, mean in means.items())
    experts = max(target.experts for target in skeleton.resolved.targets)  # pyright: ignore[reportPossiblyUnboundVariable]
    assert most[0] >= 3 * experts
    # Gate, up and down, with biases in some families,
    each = 6 if model_type == "gpt_oss" else 3
    assert most[1] <= 2 * each  # of the one that is run, and of the one before it whose storage goes as it is replaced


def test_what_was_lent_is_gone_and_can_be_run_again(tmp_path: Path) -> None:
    moe_model("mixtral").save_pretrained(tmp_path)
    plain, lending = (
        Skeleton(Checkpoint(tmp_path), torch.device("cpu"), torch.float32, for_experts=room) for room in (None, 0)
    )
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    made = []
    for skeleton in (plain, lending, lending):
        with skeleton.block(1) as block, torch.no_grad():
            made.append(block.get_submodule("mlp.experts.2")(x))
        assert all(parameter.is_meta for parameter in skeleton.blocks[1].parameters())
    assert torch.equal(made[0], made[1])
    assert torch.equal(made[1], made[2])
