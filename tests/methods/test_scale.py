"""The scale of a group is the trace of the Fisher matrix of its weights over that of F ⊗ G, by definition."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lowrank_compress.calibration.capture import capture
from lowrank_compress.methods.groups import needed
from lowrank_compress.methods.scale import SCALE, decisive, scales_of, with_scales
from lowrank_compress.model.checkpoint import Checkpoint
from lowrank_compress.model.skeleton import Skeleton
from lowrank_compress.model.walk.batch import Batch
from lowrank_compress.recipe import Recipe
from lowrank_compress.stages.calibrate import wanted_of
from lowrank_compress.stages.plan import Plan, make_plan
from tests.moe import save_moe
from tests.ordinary import load, tokens, traces
from tests.runs import Tiny


def planned(model: Path, tiny: Tiny, method: str = "auto") -> Plan:
    return make_plan(
        Recipe(model=str(model), method=method, calibration=str(tiny.text), samples=8, seq_len=32, ratio=0.3)
    )


def test_scaled_losses_have_the_trace_of_the_fisher_matrix_of_the_weights(tiny: Tiny) -> None:
    """Against gradients in the weights of every sequence by itself, and against traces summed token by token."""
    groups = planned(tiny.model, tiny).subject.groups
    sequences = tokens(12, 12, 12)
    ids = torch.stack(sequences)
    skeleton = Skeleton(Checkpoint(tiny.model), torch.device("cpu"), torch.float64)
    wanted = with_scales({}, groups)
    captured = capture(skeleton, [Batch(ids[:2]), Batch(ids[2:])], wanted, skip=lambda block: False)
    found = {key: tensor for block in captured for key, tensor in scales_of(groups, block.means).items()}
    assert found.keys() == {f"{group.name}/scale" for group in groups}
    assert any(len(group.targets) > 1 for group in groups)
    seen, _ = traces(load(tiny.model, "lm"), [name for name in wanted], sequences, None)
    for group in groups:
        whole = product = 0.0
        for target in decisive(group):
            own = seen[target.name]
            x, g = (torch.cat([getattr(trace, name) for trace in own]) for name in ("x", "g"))
            losses = sum(len(each) - 1 for each in sequences)
            whole += sum(float((trace.weight_gradient**2).sum()) for trace in own) / losses
            product += float((g**2).sum()) / losses * float((x**2).sum()) / len(x)
        assert float(found[f"{group.name}/scale"]) == pytest.approx(whole / product, rel=1e-6)
    assert any(abs(float(scale) - 1) > 0.1 for scale in found.values())


def test_they_are_taken_where_plans_are_compared(tiny: Tiny) -> None:
    plan = planned(tiny.model, tiny)
    wanted = wanted_of(plan.calibrate, plan.subject)
    assert all(wanted[target.name] >= SCALE for group in plan.subject.groups for target in decisive(group))
    named = planned(tiny.model, tiny, "kfac")
    assert wanted_of(named.calibrate, named.subject) == needed(named.subject.measured)


def test_routed_experts_have_none(tiny: Tiny, tmp_path: Path) -> None:
    plan = planned(save_moe("mixtral", tmp_path / "mixtral"), tiny)
    assert wanted_of(plan.calibrate, plan.subject) == needed(plan.subject.measured)
