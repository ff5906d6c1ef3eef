"""A second look: gradients at another model, against labels that are drawn from the dense one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lowrank_compress.calibration.again import Again
from lowrank_compress.calibration.statistics import STATISTICS, first_half, statistic_key
from lowrank_compress.model.checkpoint import Checkpoint
from lowrank_compress.model.skeleton import Skeleton
from lowrank_compress.model.walk.batch import Batch
from lowrank_compress.model.walk.walk import Walk
from tests import ordinary
from tests.calibration.test_capture import CPU, batches_of, everything, measured, sequences_of, skeleton_of
from tests.ordinary import Saved, head_statistics, load, matrix, statistics, task, tokens, traces

SHRUNK = 0.8
GRADIENTS = frozenset(name for name, statistic in STATISTICS.items() if statistic.gradient)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return Saved(tmp_path_factory.mktemp("models"))


def shrink(index: int, block: nn.Module) -> None:
    """Another model: all matrices of a block are smaller."""
    for parameter in block.parameters():
        if parameter.ndim > 1:
            parameter.data = parameter.data * SHRUNK


def shrunk(path: Path) -> Skeleton:
    return Skeleton(Checkpoint(path), CPU, torch.float64, shrink)


@dataclass(frozen=True)
class Fixed(Again):
    """Labels that are given, not drawn."""

    labels: tuple[Tensor, ...] = ()

    def labelled(self, walk: Walk, number: int) -> Batch:
        batch = walk.batches[number]
        own = self.labels[batch.first : batch.first + len(batch.ids)]
        if batch.labels is not None:
            return replace(batch, labels=torch.stack(own).squeeze(1))
        return replace(batch, ids=torch.cat([batch.ids[:, :1], torch.stack(own)], 1))


@pytest.mark.parametrize("case", ["llama-lm", "gpt2-lm", "bert-classification"])
def test_gradients_of_both_models_equal_ordinary_autograd(
    case: str, saved: Saved, monkeypatch: pytest.MonkeyPatch
) -> None:
    sequences, skeleton = sequences_of(case), skeleton_of(saved, case)
    drawn = tokens(*(len(ids) - 1 for ids in sequences), seed=1)
    if task(case) == "classification":
        drawn = [torch.tensor([label]) for label in (0, 0, 2, 1)]
    again = Fixed(shrunk(saved(case)), labels=tuple(drawn))
    found = measured(skeleton, batches_of(case), everything(skeleton), again=again)
    dense = measured(skeleton_of(saved, case), batches_of(case), everything(skeleton))

    original, model = load(saved(case), task(case)), load(saved(case), task(case))
    for name in skeleton.resolved.blocks:
        shrink(0, model.get_submodule(name))

    def against_drawn(model: nn.Module, ids: Tensor, label: int | None) -> tuple[Tensor, int]:
        (number,) = [i for i, own in enumerate(sequences) if own is ids]
        logits = model(input_ids=ids[None]).logits
        logits = logits[0, :-1] if task(case) == "lm" else logits
        return nn.functional.cross_entropy(logits, drawn[number], reduction="sum"), len(drawn[number])

    monkeypatch.setattr(ordinary, "summed_loss", against_drawn)
    names = [target.name for target in skeleton.resolved.targets]
    seen, terms = traces(model, names, sequences, None if task(case) == "lm" else [0] * len(sequences))
    for target in skeleton.resolved.targets:
        own = statistics(seen[target.name], matrix(original, target.name), terms)  # δ by the dense weight
        own |= head_statistics(model, target.role, seen[target.name], terms)
        for name in own:
            key = statistic_key(target, name)
            before, value = dense[target.block][key], found[target.block][key]
            expected = (before + own[name]) / 2 if name in GRADIENTS else before
            torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-14)


def test_labels_are_drawn_from_the_dense_predictions(saved: Saved) -> None:
    """Many draws for one window have the frequencies of the dense model's predictions; a seed repeats them."""
    case, copies = "llama-lm", 3000
    (ids,) = tokens(4)
    batch = Batch(ids.repeat(copies, 1))
    walk = Walk([skeleton_of(saved, case), shrunk(saved(case))], [batch])
    for _ in walk.forwards():
        pass
    drawn = Again(walk.models[1], seed=3).labelled(walk, 0).ids
    assert torch.equal(drawn[:, 0], batch.ids[:, 0])
    with torch.no_grad():
        shares = load(saved(case), "lm")(ids[None]).logits[0, :-1].softmax(-1)
    counts = torch.stack([drawn[:, position].bincount(minlength=96) for position in (1, 2, 3)]) / copies
    # The mean squared error of frequencies is that of independent draws.
    error = ((counts - shares).square().sum(1) * copies / (1 - shares.square().sum(1))).mean()
    assert 0.5 < float(error) < 1.6
    assert torch.equal(drawn, Again(walk.models[1], seed=3).labelled(walk, 0).ids)
    assert not torch.equal(drawn, Again(walk.models[1], seed=4).labelled(walk, 0).ids)


def test_what_has_lost_outputs_keeps_its_own_fisher_matrix_scaled(saved: Saved) -> None:
    """Of narrowed targets only the growth of the gradients of those outputs counts that there still are."""
    skeleton = skeleton_of(saved, "llama-lm")
    up = next(target for target in skeleton.resolved.of_block(0) if target.role == "up")
    keys = [statistic_key(up, name) for name in ("in_fisher", "out_square")]
    generator = torch.Generator().manual_seed(0)
    half = torch.randn(32, 32, dtype=torch.float64, generator=generator)
    dense = {keys[0]: half @ half.T, first_half(keys[0]): half.T @ half, keys[1]: torch.tensor([1.0, 2.0, 3.0, 10.0])}
    edited = {key: torch.zeros_like(value) for key, value in dense.items()} | {
        keys[1]: torch.tensor([4.0, 0.0, 8.0, 0.0])
    }
    found = Again(skeleton, frozenset({up.name})).combined((up,), dense, edited)
    for key, value in dense.items():
        torch.testing.assert_close(found[key], value * (1 + 12 / 4) / 2)
