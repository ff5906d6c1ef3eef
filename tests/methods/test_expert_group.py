"""Which experts and which of their hidden units are kept: against rankings in plain Python, token by token."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from lowrank_compress.allocation.choice import Choice
from lowrank_compress.arch.resolve import resolve, separate_experts
from lowrank_compress.calibration.capture import capture
from lowrank_compress.config import Scheme
from lowrank_compress.errors import UnsupportedError
from lowrank_compress.methods.candidates import all_groups, candidates_of
from lowrank_compress.methods.edit import Rerouted, Source
from lowrank_compress.methods.expert_group import ExpertGroup
from lowrank_compress.methods.groups import needed
from lowrank_compress.methods.linear import Damping
from lowrank_compress.model.checkpoint import Checkpoint
from lowrank_compress.model.skeleton import Skeleton
from lowrank_compress.model.walk.batch import Batch
from tests.moe import Watched, moe_model
from tests.ordinary import tokens

LENGTH = 13
Found = tuple[Skeleton, list[tuple[ExpertGroup, dict[str, Tensor]]], dict[str, list[tuple[Tensor, ...]]]]


def groups_of(method: str, skeleton: Skeleton) -> list[ExpertGroup]:
    groups = all_groups(candidates_of(skeleton.resolved, Scheme(methods={"experts": method}, metric="gram")))
    return [group for group in groups if isinstance(group, ExpertGroup)]


def decomposed(method: str, model_type: str, place: Path) -> Found:
    """The bases of all blocks, and what every expert's down-projection saw, token by token."""
    model = moe_model(model_type, torch.float64)
    model.save_pretrained(place)
    skeleton = Skeleton(Checkpoint(place), torch.device("cpu"), torch.float64)
    sequences = tokens(*[LENGTH] * 4)
    groups = groups_of(method, skeleton)
    batches = [Batch(torch.stack(sequences))]
    blocks = {b.block: b.means for b in capture(skeleton, batches, needed(groups), skip=lambda block: False)}
    found = []
    for group in groups:
        means = blocks[group.block]
        found.append((group, group.decompose(skeleton.blueprint.weight, means, Damping(), group.shape[0])))
    return skeleton, found, Watched(model).traces(sequences)


def saliency(method: str, seen: list[tuple[Tensor, ...]], weight: Tensor) -> list[float]:
    """One for the expert, or for camera one for each hidden unit, by its definition."""
    count, norms, energy, peak = 0, 0.0, [0.0] * weight.shape[1], [0.0] * weight.shape[1]
    for hidden, outputs, _, routers, _ in seen:
        for h, y, w in zip(hidden, outputs, routers, strict=True):
            count += 1
            norms += float(w) * float(y.norm())
            if method == "camera":
                added = [float((w * h[i] * weight[:, i]).square().sum()) for i in range(len(h))]
                energy = [e + each for e, each in zip(energy, added, strict=True)]
                peak = [max(p, each) for p, each in zip(peak, added, strict=True)]
    if method == "camera":
        return [(0.1 * e + 0.9 * p) / (4 * LENGTH) for e, p in zip(energy, peak, strict=True)]
    sums = {"frequency": count / (4 * LENGTH), "reap-sum": norms / (4 * LENGTH), "reap": norms / count if count else 0}
    return [sums[method]]


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("method", ["frequency", "reap", "reap-sum", "camera"])
def test_the_ranking_is_that_of_every_token_by_itself(method: str, model_type: str, tmp_path: Path) -> None:
    skeleton, found, traces = decomposed(method, model_type, tmp_path)
    assert len(found) == {"mixtral": 2, "qwen3_moe": 1, "gpt_oss": 2}[model_type]
    for group, basis in found:
        downs = [target for target in group.targets if target.role == "down"]
        each = [saliency(method, traces[down.name], skeleton.blueprint.weight(down)) for down in downs]
        flat = [(value, -number) for number, value in enumerate(value for own in each for value in own)]
        order = [-number for _, number in sorted(flat, reverse=True)]
        assert basis[f"{group.name}/order"].tolist() == order
        lost = [sum(flat[number][0] for number in order[kept:]) for kept in range(len(order) + 1)]
        tail = basis[f"{group.name}/tail"].numpy()
        np.testing.assert_allclose(tail, lost, rtol=1e-10, atol=1e-12 * lost[0])
        assert tail[-1] == 0
        choices = group.choices("width")
        assert (group.losses(basis, choices) == tail[choices.parameters[:, 0]]).all()
        assert group.total(basis) == tail[0]


def source(skeleton: Skeleton) -> Source:
    read = skeleton.blueprint
    return Source(read.weight, read.bias, torch.device("cpu"), torch.float64)


def test_units_that_are_kept_stay_as_they_are(tmp_path: Path) -> None:
    skeleton, ((group, basis), *_), traces = decomposed("camera", "mixtral", tmp_path)
    downs = [target for target in group.targets if target.role == "down"]
    flat = [
        (value, expert, unit)
        for expert, down in enumerate(downs)
        for unit, value in enumerate(saliency("camera", traces[down.name], skeleton.blueprint.weight(down)))
    ]
    kept = defaultdict(list)
    for _, expert, unit in sorted(flat, reverse=True)[:37]:
        kept[expert].append(unit)
    edit = group.encode(source(skeleton), Choice("width", (37,)), basis)
    replaced = {r.target.name: r.weight for r in group.replace(source(skeleton), Choice("width", (37,)), basis)}  # pyright: ignore
    assert edit.router is None
    for target in group.targets:
        assert target.expert is not None
        units, weight = sorted(kept[target.expert]), skeleton.blueprint.weight(target)
        expected = weight[:, units] if target.role == "down" else weight[units]
        assert torch.equal(edit.parts[target.name].inner, expected)
        whole = torch.zeros_like(weight)
        if target.role == "down":
            whole[:, units] = expected
        else:
            whole[units] = expected
        assert torch.equal(replaced[target.name], whole)
    assert group.price(Choice("width", (37,))).elements == 37 * 3 * 32
    assert group.price(Choice("width", (37,))).indices == 0
    stored = sum(part.inner.numel() for part in edit.parts.values())
    assert stored == group.price(Choice("width", (37,))).elements
    # Width 0 for all of them, and no more than there are.
    choices = group.choices("width")
    assert choices.parameters[:, 0].tolist() == list(range(4 * 40))
    assert group.choices("width", 24).parameters[:, 0].tolist() == list(range(0, 160, 24))


def test_experts_that_are_kept_stay_as_they_are(tmp_path: Path) -> None:
    skeleton, ((group, basis), *_), traces = decomposed("reap", "mixtral", tmp_path)
    downs = [target for target in group.targets if target.role == "down"]
    values = [saliency("reap", traces[down.name], torch.empty(0, 0))[0] for down in downs]
    gone = values.index(min(values))
    choice = Choice("width", (3,))
    edit = group.encode(source(skeleton), choice, basis)
    assert {name for name in edit.parts} == {t.name for t in group.targets if t.expert == gone}
    assert all(part.inner.numel() == 0 for part in edit.parts.values())
    (rerouted,) = group.replace(source(skeleton), choice, basis)
    for found in (rerouted, edit.router):
        assert isinstance(found, Rerouted)
        assert found.path == "model.layers.0.mlp.gate"
        assert found.kept.tolist() == [number for number in range(4) if number != gone]
    # As many as a token goes to stay, whatever a multiple asks for; the list of the router counts.
    for multiple in (1, 8):
        choices = group.choices("width", multiple)
        assert choices.parameters[:, 0].tolist() == [2, 3]
        assert choices.stored.tolist() == [2 * 3 * 32 * 40 + 2, 3 * 3 * 32 * 40 + 3]
        assert choices.indices.tolist() == [2, 3]
    assert (group.price(choice).elements, group.price(choice).indices) == (3 * 3 * 32 * 40 + 3, 3)


@pytest.mark.parametrize(
    ("model_type", "fields", "why"),
    [
        ("deepseek_v3", {}, "has e_score_correction_bias|among 2 groups"),
        (
            "deepseek_v2",
            {"topk_method": "group_limited_greedy", "n_group": 2, "topk_group": 1},
            "among 2 groups of equally many experts",
        ),
        ("deepseek_v2", {}, ""),
        ("olmoe", {}, ""),
        ("gpt_oss", {}, ""),
    ],
)
def test_routers_that_cannot_do_with_fewer_are_refused(model_type: str, fields: dict, why: str) -> None:
    model = moe_model(model_type, **fields)
    separate_experts(model)
    resolved = resolve(model)
    scheme = Scheme(methods={"experts": "reap"}, metric="gram")
    if not why:
        assert candidates_of(resolved, scheme)
        return
    with pytest.raises(UnsupportedError, match=f"reap cannot take experts from '{model_type}'.*({why})"):
        candidates_of(resolved, scheme)
    assert candidates_of(resolved, Scheme(methods={"experts": "camera"}, metric="gram"))
