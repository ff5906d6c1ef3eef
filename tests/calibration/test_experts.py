"""Statistics of routed experts: against the whole model and autograd, and where experts saw little or nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from lowrank_compress.arch.targets import Target
from lowrank_compress.calibration.capture import capture
from lowrank_compress.calibration.experts import tokens_seen
from lowrank_compress.calibration.statistics import STATISTICS, statistic_key
from lowrank_compress.model.checkpoint import Checkpoint
from lowrank_compress.model.skeleton import Skeleton
from lowrank_compress.model.walk.batch import Batch
from tests.moe import MOE, Watched, expert_statistics, moe_model
from tests.ordinary import tokens

LENGTH = 13


def wanted_of(targets: tuple[Target, ...]) -> dict[str, frozenset[str]]:
    """Everything that an expert's matrix can have."""
    return {
        target.name: frozenset(
            name for name, each in STATISTICS.items() if each.roles in (None, ("down",)) and each.fits(target.role, 0)
        )
        for target in targets
        if target.expert is not None
    }


def measured(skeleton: Skeleton, sequences: list[Tensor], halves: bool = False) -> dict[int, dict[str, Tensor]]:
    ids = torch.stack(sequences)
    batches = [Batch(ids[:2]), *(Batch(each[None]) for each in ids[2:])]
    wanted = wanted_of(skeleton.resolved.targets)
    found = capture(skeleton, batches, wanted, skip=lambda block: False, halves=halves)
    return {block.block: block.means for block in found}


def assert_near(found: Tensor, expected: Tensor, what: object) -> None:
    assert found.shape == expected.shape, what
    assert float((found - expected).abs().max()) <= 1e-12 * float(expected.abs().max()), what


@pytest.mark.parametrize("model_type", MOE)
def test_every_statistic_equals_ordinary_autograd(model_type: str, tmp_path: Path) -> None:
    model = moe_model(model_type, torch.float64)
    model.save_pretrained(tmp_path)
    skeleton = Skeleton(Checkpoint(tmp_path), torch.device("cpu"), torch.float64)
    sequences = tokens(*[LENGTH] * 4)
    means = measured(skeleton, sequences)
    traces = Watched(model).traces(sequences)
    compared = 0
    for target in skeleton.resolved.targets:
        if target.expert is None:
            continue
        weight = skeleton.blueprint.weight(target)
        expected = expert_statistics(traces[target.name], weight, target.role, 4 * LENGTH, 4 * (LENGTH - 1))
        for name, value in expected.items():
            assert_near(means[target.block][statistic_key(target, name)], value, (target.name, name))
            compared += 1
    assert compared >= 4 * (3 * 9 + 5)


def test_padding_is_in_no_statistic(tmp_path: Path) -> None:
    """Padded tokens go to experts too; activations alone, of a model without a loss to pad for."""
    moe_model("mixtral", torch.float64).save_pretrained(tmp_path)
    skeleton = Skeleton(Checkpoint(tmp_path), torch.device("cpu"), torch.float64)
    short, long = tokens(7, LENGTH)
    wanted = {name: frozenset({"in_gram", "in_mean"}) for name in wanted_of(skeleton.resolved.targets)}
    ids = torch.stack([torch.cat([short, torch.zeros(LENGTH - 7, dtype=torch.long)]), long])
    mask = torch.ones_like(ids)
    mask[0, 7:] = 0
    padded, alone = (
        {block.block: block.means for block in capture(skeleton, batches, wanted, skip=lambda block: False)}
        for batches in ([Batch(ids, mask)], [Batch(short[None]), Batch(long[None])])
    )
    assert padded[1].keys() == alone[1].keys()
    for key, value in alone[1].items():
        assert_near(padded[1][key], value, key)


def test_halves_are_of_the_even_sequences(tmp_path: Path) -> None:
    model = moe_model("mixtral", torch.float64)
    model.save_pretrained(tmp_path)
    skeleton = Skeleton(Checkpoint(tmp_path), torch.device("cpu"), torch.float64)
    sequences = tokens(*[LENGTH] * 4)
    means = measured(skeleton, sequences, halves=True)
    watched = Watched(model)
    whole, first = watched.traces(sequences), watched.traces(sequences[::2])
    for target in skeleton.resolved.targets:
        if target.expert is None:
            continue
        weight = skeleton.blueprint.weight(target)
        share = sum(len(each[0]) for each in whole[target.name]) / (4 * LENGTH)
        half = expert_statistics(first[target.name], weight, target.role, 2 * LENGTH, 2 * (LENGTH - 1))
        own = sum(len(each[0]) for each in first[target.name]) / (2 * LENGTH)
        for name in ("in_gram", "out_fisher"):
            found = means[target.block][f"{statistic_key(target, name)}@first"]
            # Of gradients, by the share of all tokens in both halves, so that these add up.
            scale = own / share if STATISTICS[name].gradient else 1
            assert_near(found, half[name] * scale, (target.name, name))


def test_an_expert_that_saw_nothing_is_taken_for_the_average_of_the_others(tmp_path: Path) -> None:
    model = moe_model("mixtral", torch.float64, num_local_experts=16, num_experts_per_tok=1)
    model.save_pretrained(tmp_path)
    skeleton = Skeleton(Checkpoint(tmp_path), torch.device("cpu"), torch.float64)
    for sequences, halves in ((tokens(9), False), (tokens(9, 9, 9), True)):
        means = measured(skeleton, sequences, halves)[1]
        seen = {path.rpartition(".")[2]: count for path, count in tokens_seen(means).items()}
        assert sum(seen.values()) == 9 * len(sequences)
        assert 0 < len([number for number, count in seen.items() if not count]) < 15
        for name in ("in_gram", "out_fisher", "in_fisher"):
            moments = {
                number: means[f"expert.{number}.hidden/{name}" if name == "in_gram" else f"{path}/{name}"]
                for number in seen
                for path in [f"model.layers.1.mlp.experts.{number}.lr_down"]
            }
            if not halves:
                there = torch.stack([moments[number] for number, count in seen.items() if count])
                assert all(
                    torch.allclose(moments[number], there.mean(0)) for number, count in seen.items() if not count
                )
            # Never by zero loss, be it of one half alone.
            assert all(float(moment.diagonal().sum()) > 0 for moment in moments.values())
