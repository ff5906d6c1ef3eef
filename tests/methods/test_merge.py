"""Which experts are merged, and to what: against every partition, plain loops and the decomposition as written."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from lowrank_compress.allocation.choice import Choice
from lowrank_compress.calibration.capture import capture
from lowrank_compress.calibration.statistics import LIKENESS, statistic_key
from lowrank_compress.config import Scheme
from lowrank_compress.methods.candidates import all_groups, candidates_of
from lowrank_compress.methods.edit import Source
from lowrank_compress.methods.groups import needed
from lowrank_compress.methods.linear import Damping
from lowrank_compress.methods.merge import alignment, clusterings, leads_of, merged
from lowrank_compress.methods.merge_group import MergeGroup
from lowrank_compress.model.checkpoint import Checkpoint
from lowrank_compress.model.skeleton import Skeleton
from lowrank_compress.model.walk.batch import Batch
from tests.moe import Watched, moe_model
from tests.ordinary import tokens

LENGTH = 13


def points(count: int, seed: int) -> Tensor:
    return torch.randn(count, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def within(rows: Tensor, labels: tuple[int, ...]) -> float:
    """Σ of squared distances to the centres of clusters."""
    total = 0.0
    for label in set(labels):
        own = rows[[number for number, each in enumerate(labels) if each == label]]
        total += float((own - own.mean(0)).square().sum())
    return total


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_clusters_are_the_best_of_all_partitions(seed: int) -> None:
    rows = points(6, seed)
    labels, inertia = clusterings(rows @ rows.mT)
    for clusters in range(1, 7):
        every = (each for each in itertools.product(range(clusters), repeat=6) if len(set(each)) == clusters)
        assert float(inertia[clusters - 1]) == pytest.approx(min(within(rows, each) for each in every), abs=1e-9)
        assert within(rows, tuple(labels[clusters - 1].tolist())) == pytest.approx(float(inertia[clusters - 1]))
    again = clusterings(rows @ rows.mT)
    assert torch.equal(again[0], labels)


def test_experts_that_are_alike_are_no_trouble() -> None:
    rows = torch.ones(5, 3, dtype=torch.float64)
    labels, inertia = clusterings(rows @ rows.mT)
    assert inertia.abs().max() < 1e-12
    assert [len(set(own.tolist())) for own in labels] == [1, 2, 3, 4, 5]


def test_the_busiest_of_a_cluster_leads_it() -> None:
    labels, shares = torch.tensor([0, 1, 0, 1, 2]), torch.tensor([0.1, 0.4, 0.3, 0.4, 0.0])
    assert leads_of(labels, shares).tolist() == [2, 1, 2, 1, 4]


@pytest.mark.parametrize(("rows", "columns"), [(4, 7), (7, 4), (9, 2)])
@pytest.mark.parametrize("kept", [1.0, 0.5])
def test_merged_is_the_joint_decomposition_with_v_by_frequency(rows: int, columns: int, kept: float) -> None:
    generator = torch.Generator().manual_seed(rows)
    matrices = [torch.randn(rows, columns, generator=generator, dtype=torch.float64) for _ in range(3)]
    shares = torch.tensor([0.5, 0.2, 0.1], dtype=torch.float64)
    u, values, vt = np.linalg.svd(torch.cat(matrices, 1).numpy(), full_matrices=False)
    directions = round(kept * rows)
    parts = np.split(vt, 3, axis=1)
    v = np.sum([float(share / shares.sum()) * each for share, each in zip(shares, parts, strict=True)], axis=0)
    expected = u[:, :directions] * values[:directions] @ v[:directions]
    np.testing.assert_allclose(merged(matrices, shares, kept).numpy(), expected, atol=1e-10)
    nobody = merged(matrices, torch.zeros(3, dtype=torch.float64), 1.0)
    np.testing.assert_allclose(nobody.numpy(), sum(matrices).numpy() / 3)  # pyright: ignore


def test_units_are_found_again_in_another_order() -> None:
    lead = {
        role: points(8, seed).mT[:, :8] if role == "down" else points(8, seed)
        for seed, role in enumerate(("gate", "up", "down"))
    }
    order = torch.randperm(8, generator=torch.Generator().manual_seed(3))
    other = {
        role: 2 * (weight[:, order] if role == "down" else weight[order]) + 0.01 * points(1, 9).mean()
        for role, weight in lead.items()
    }
    found = alignment(lead, other)
    assert order[found].tolist() == list(range(8))


def test_a_block_of_experts_token_by_token(tmp_path: Path) -> None:
    model = moe_model("qwen3_moe", torch.float64)
    model.save_pretrained(tmp_path)
    skeleton = Skeleton(Checkpoint(tmp_path), torch.device("cpu"), torch.float64)
    sequences = tokens(*[LENGTH] * 3)
    candidates = candidates_of(skeleton.resolved, Scheme(methods={"experts": "merge"}, metric="gram"))
    (group,) = all_groups(candidates)
    assert isinstance(group, MergeGroup)
    (found,) = capture(skeleton, [Batch(torch.stack(sequences))], needed([group]), skip=lambda block: block == 0)
    watched = Watched(model)
    watched.traces(sequences[:1])
    entering: list[Tensor] = []
    path = group.path
    experts = model.get_submodule(path)
    inner = experts.forward
    experts.forward = lambda x, *rest: (entering.append(x), inner(x, *rest))[1]  # pyright: ignore
    with torch.no_grad():
        model(torch.stack(sequences))
    expected = torch.zeros(6, 6, dtype=torch.float64)
    for x in entering[0]:
        made = []
        for gate_up, down in zip(experts.gate_up_proj, experts.down_proj, strict=True):  # pyright: ignore
            gate, up = (x @ gate_up.T).chunk(2)
            made.append((experts.act_fn(gate) * up) @ down.T)  # pyright: ignore
        for i, one in enumerate(made):
            for j, other in enumerate(made):
                expected[i, j] += float(one @ other / one.norm() / other.norm()) / (3 * LENGTH)
    downs = [target for target in group.targets if target.role == "down"]
    likeness = torch.stack([found.means[statistic_key(down, LIKENESS)] for down in downs])
    torch.testing.assert_close(likeness, expected, rtol=1e-10, atol=1e-12)

    basis = group.decompose(skeleton.blueprint.weight, found.means, Damping(options={"align": True}), 6)
    read = skeleton.blueprint
    source = Source(read.weight, read.bias, torch.device("cpu"), torch.float64)
    choices = group.choices("width", 8)
    assert choices.parameters[:, 0].tolist() == [1, 2, 3, 4, 5]
    losses = group.losses(basis, choices)
    assert (np.diff(losses) <= 0).all()
    assert losses[-1] > 0
    each = 3 * 32 * 24
    assert choices.stored.tolist() == [each * left + 6 for left in (1, 2, 3, 4, 5)]
    assert choices.indices.tolist() == [6] * 5
    choice = Choice("width", (3,))
    edit = group.encode(source, choice, basis)
    assert edit.merged is not None
    leads = edit.merged.leads.tolist()
    assert edit.merged.path == path
    assert len(set(leads)) == 3
    assert all(leads[lead] == lead for lead in leads)
    replaced = {r.target.name: r.weight for r in group.replace(source, choice, basis)}  # pyright: ignore
    shares = [float(found.means[statistic_key(down, "routed")]) for down in downs]
    for lead in set(leads):
        members = [number for number, own in enumerate(leads) if own == lead]
        assert shares[lead] == max(shares[member] for member in members)
        for target in (target for target in group.targets if target.expert == lead):
            if len(members) == 1:
                assert target.name not in edit.parts
                continue
            mean = edit.parts[target.name].inner
            same = [t for t in group.targets if t.expert in members and t.role == target.role]
            assert all(torch.equal(replaced[t.name], mean) for t in same)
            assert all(edit.parts[t.name].inner.numel() == 0 for t in same if t.expert != lead)
            # Whatever the order of units, Σ over all of them is that of the weighted mean.
            total = sum(shares[member] for member in members)
            side = 1 if target.role == "down" else 0
            weighed = sum(shares[t.expert or 0] / total * read.weight(t) for t in same)
            torch.testing.assert_close(mean.sum(side), weighed.sum(side))  # pyright: ignore
    stored = sum(part.inner.numel() for part in edit.parts.values())
    alone = sum(1 for lead in set(leads) if leads.count(lead) == 1)
    assert stored + alone * each + 6 == group.price(choice).elements
