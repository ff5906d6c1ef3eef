"""Runs that have one expert at a time in memory give the bytes of those that have all experts of a block."""

from __future__ import annotations

import re
import weakref
from pathlib import Path

import pytest
from torch import Tensor

from lowrank_compress.model.skeleton import Skeleton
from tests.moe import save_moe
from tests.runs import Tiny, contents, done

FEW = ("--samples", "4", "--seq-len", "16", "--ratio", "0.4")
# Way -> a family, and options.
WAYS = {
    # Several plans, a second allocation, and what is fitted anew.
    "auto": ("mixtral", "--method", "auto"),
    "merged": ("mixtral", "--method", "auto", "--experts", "merge", "--no-second"),
    "pruned": ("mixtral", "--method", "auto", "--experts", "reap", "--no-second"),
    "measured": ("mixtral", "--method", "kfac", "--allocate", "measured"),
    "biases": ("gpt_oss", "--method", "svd", "--refine"),
}


class Alive:
    """Counts the tensors of experts that are in memory at a time, as skeletons read them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = self.most = 0
        read = Skeleton._read

        def counted(skeleton: Skeleton, name: str) -> Tensor:
            tensor = read(skeleton, name)
            if re.search(r"\.experts\.\d+\.", name) and tensor.numel():
                self.now += 1
                self.most = max(self.most, self.now)
                weakref.finalize(tensor.untyped_storage(), self._gone)
            return tensor

        monkeypatch.setattr(Skeleton, "_read", counted)

    def _gone(self) -> None:
        self.now -= 1


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_no_byte_depends_on_how_many_experts_are_in_memory(
    way: str, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, *method = WAYS[way]
    kinds = {"layer_types": ["full_attention"]} if family == "gpt_oss" else {}
    model = save_moe(family, tmp_path / "dense", num_hidden_layers=1, **kinds)
    options = (model, *method, *FEW, "--calibration", tiny.text)
    alive, most = Alive(monkeypatch), []
    for name, budget in (("whole", "8GB"), ("in-turn", "1")):
        alive.most = alive.now
        done("compress", *options, "--memory-budget", budget, "--out", tmp_path / name)
        most.append(alive.most)
    whole, in_turn = (contents(tmp_path / name) for name in ("whole", "in-turn"))
    for found in (whole, in_turn):
        del found["cost.json"]
    assert whole == in_turn
    # Of each model the one that is run, and the one before it whose storage goes as it is replaced; not all four.
    assert 2 * most[1] <= most[0]
