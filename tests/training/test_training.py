"""Factors as pairs, the losses, and steps that follow from their number alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowrank_compress.model.embedding import Embedding
from lowrank_compress.model.walk.batch import Batch
from lowrank_compress.shipped.formats.table import FORMATS
from lowrank_compress.shipped.linear import CompressedLinear
from lowrank_compress.training.loss import from_embedding, from_teacher, from_text, mean_loss
from lowrank_compress.training.pairs import is_low_rank, paired, stored
from lowrank_compress.training.recovery import picked
from lowrank_compress.training.student import Student
from lowrank_compress.training.trainer import FLOOR, WARM_UP, Data, Trainer, joined, rate
from tests.tiny import tiny_model

LOW_RANK = [name for name in FORMATS if is_low_rank({"format": name})]


def layer_of(formats: list[str], heads: int = 1) -> tuple[CompressedLinear, dict]:
    """A random layer of 12 rows a part, with rank 5 in each; in float64."""
    parts = [FORMATS[name].describe(12, 16, *([5] if FORMATS[name].parameters else [])) for name in formats]
    entry = {"in_features": 16, "out_features": 12 * len(parts), "bias": True, "heads": heads, "parts": parts}
    layer = CompressedLinear(**entry, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    for name, buffer in layer.named_buffers():
        if name.startswith("lr_index"):
            buffer.copy_(torch.randperm(12, generator=generator)[:5].sort().values)
    return layer, entry


@pytest.mark.parametrize(
    ("formats", "heads"),
    [([name], 1) for name in FORMATS] + [(["pivot", "dense", "pair"], 1), (["svd-core", "pivot", "dense"], 3)],
    ids=str,
)
def test_pairs_and_back_keep_the_product(formats: list[str], heads: int):
    layer, entry = layer_of(formats, heads)
    x = torch.randn(7, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    pair = paired(layer, entry)
    torch.testing.assert_close(pair(x), layer(x), rtol=0, atol=1e-11)
    again = CompressedLinear(**entry, dtype=torch.float64)
    again.load_state_dict(stored(pair, entry, torch.float64, "layer"))
    torch.testing.assert_close(again.dense_weight(), layer.dense_weight(), rtol=0, atol=1e-11)
    torch.testing.assert_close(again(x), layer(x), rtol=0, atol=1e-11)
    assert sum(t.numel() for t in again.state_dict().values()) == sum(t.numel() for t in layer.state_dict().values())


@pytest.mark.parametrize("form", LOW_RANK)
def test_pairs_are_balanced(form: str):
    layer, entry = layer_of([form])
    pair = paired(layer, entry)
    left, right = pair.get_parameter("lr_out.weight"), pair.get_parameter("lr_in.weight")
    torch.testing.assert_close(left.T @ left, right @ right.T, rtol=0, atol=1e-10)


def slow_divergence(teacher: nn.Module, student: nn.Module, ids: Tensor) -> float:
    """Mean over positions that a token follows of Σ p log(p / q), position by position."""
    total, count = 0.0, 0
    with torch.no_grad():
        for row in ids:
            p, q = (model(input_ids=row[None]).logits[0].double().softmax(-1) for model in (teacher, student))
            for position in range(len(row) - 1):
                total += sum(float(a * math.log(a / b)) for a, b in zip(p[position], q[position], strict=True))
                count += 1
    return total / count


def test_the_loss_is_the_divergence_from_the_teacher():
    teacher, student = tiny_model("llama"), tiny_model("llama", seed=1)
    ids = torch.randint(4, 96, (2, 9), generator=torch.Generator().manual_seed(0))
    found = mean_loss(from_teacher(student, teacher), joined([Batch(row[None]) for row in ids], 1))
    assert found == pytest.approx(slow_divergence(teacher, student, ids), rel=1e-5)
    assert mean_loss(from_teacher(teacher, teacher), [Batch(ids)]) == pytest.approx(0, abs=1e-7)


def test_a_classifiers_loss_is_over_its_classes():
    teacher, student = tiny_model("bert", "classification"), tiny_model("bert", "classification", seed=1)
    batch = Batch(
        torch.randint(4, 96, (3, 9), generator=torch.Generator().manual_seed(0)), labels=torch.tensor([0, 2, 1])
    )
    p, q = (model(input_ids=batch.ids).logits.double().softmax(-1) for model in (teacher, student))
    assert mean_loss(from_teacher(student, teacher, "classification"), [batch]) == pytest.approx(
        (p * (p / q).log()).sum(-1).mean().item(), rel=1e-5
    )
    assert mean_loss(from_text(student, "classification"), [batch]) == pytest.approx(
        -q.log()[torch.arange(3), batch.labels].mean().item(), rel=1e-5
    )


def test_rates_rise_and_fall():
    found = [rate(2.0, step, 60) for step in range(60)]
    assert found[:WARM_UP] == pytest.approx([2 * (step + 1) / WARM_UP for step in range(WARM_UP)])
    assert found[WARM_UP:] == sorted(found[WARM_UP:], reverse=True)
    assert rate(2.0, 60, 60) == pytest.approx(2 * FLOOR)
    assert rate(2.0, 0, 1) == rate(2.0, 1, 8) == 2


@pytest.mark.parametrize(
    ("found", "rate"),
    [
        ({1e-3: 0.6762, 3e-3: 0.6797, 1e-2: 1.0041}, 3e-3),  # hardly worse after a few steps
        ({1e-3: 0.7273, 3e-3: 0.8033, 3e-4: 0.7964}, 1e-3),
        ({1e-3: 0.97, 3e-3: 1.1, 3e-4: 0.96, 1e-4: 0.955}, 1e-4),  # all are worse than before
        ({1e-3: math.inf, 3e-3: math.inf, 3e-4: 0.9}, 3e-4),
    ],
)
def test_of_rates_that_gain_nearly_the_same_the_largest_is_picked(found: dict[float, float], rate: float):
    assert picked(found, 0.95) == rate


def test_each_sequence_comes_once_a_round():
    items = [Batch(torch.full((1, 4 + number % 2), number)) for number in range(10)]
    data = Data(items, 3, 2, 5)
    seen = [int(row[0]) for step in range(20) for batch in data.of_step(step) for row in batch.ids]
    assert len(seen) == 60
    by_number = [sorted(row for batch in data.of_step(step) for row in batch.ids[:, 0].tolist()) for step in range(10)]
    assert sorted(number for step in by_number for number in step) == sorted(list(range(10)) * 3)
    assert all(len(batch.ids) <= 2 for batch in data.of_step(0))


@pytest.mark.parametrize("model_type", ["bert", "roberta", "llama", "gpt2"])
def test_padding_changes_no_embedding_and_no_gradient(model_type: str):
    task = "lm" if model_type in ("llama", "gpt2") else "classification"
    models: list[Any] = [tiny_model(model_type, task, seed=seed).base_model for seed in (1, 0)]
    student, teacher = models
    numbers = torch.Generator().manual_seed(0)
    items = [Batch(torch.randint(4, 96, (1, length), generator=numbers)) for length in (9, 3, 17, 5, 4, 16)]
    data = Data(items, 6, 2, 0, student.config.pad_token_id or 0)
    batches = data.of_step(0)
    real = torch.cat([batch.mask.sum(1) for batch in batches if batch.mask is not None])
    assert sorted(real.tolist()) == [3, 4, 5, 9, 16, 17]
    assert all(batch.ids.numel() <= 2 * 17 for batch in batches)
    assert len(batches) < 4  # short ones are more at once
    loss = from_embedding(student, teacher, Embedding(("mean", "lasttoken", "max"), True))
    found = []
    for made in (batches, items):
        student.zero_grad()
        total = torch.stack([loss(batch)[0] for batch in made]).sum()
        total.backward()
        gradients = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
        found.append((total.detach(), gradients))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-6)
    assert found[0][1].keys() == found[1][1].keys() != set()
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(gradient, found[1][1][name], rtol=1e-3, atol=1e-5)


def test_a_state_is_all_that_steps_depend_on():
    def trainer() -> tuple[nn.Module, Trainer]:
        model = tiny_model("llama", seed=1)
        loss = from_teacher(model, tiny_model("llama"))
        return model, Trainer(dict(model.model.layers.named_parameters()), loss, 1e-2)

    data = Data(
        [Batch(torch.randint(4, 96, (1, 9), generator=torch.Generator().manual_seed(n))) for n in range(5)], 2, 1, 0
    )
    (whole, straight), (other, resumed) = trainer(), trainer()
    for step in range(4):
        straight.step(data.of_step(step), 4)
        if step == 1:
            resumed.take_up({name: tensor.clone() for name, tensor in straight.state().items()}, 2)
    for step in (2, 3):
        resumed.step(data.of_step(step), 4)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_a_gradient_is_that_of_the_mean_and_clipped():
    model = tiny_model("llama", seed=1)
    loss = from_teacher(model, tiny_model("llama"))
    learning = {"norm": model.model.norm.weight}
    batch = Batch(torch.randint(4, 96, (4, 9), generator=torch.Generator().manual_seed(0)))
    before, trainer = model.model.norm.weight.detach().clone(), Trainer(learning, loss, 1e-3)
    summed, count = loss(batch)
    (expected,) = torch.autograd.grad(summed / count, [model.model.norm.weight])
    trainer.step(joined([Batch(row[None]) for row in batch.ids], 1), 40)
    expected = expected * min(1.0, 1 / float(expected.norm()))
    assert model.model.norm.weight.grad is not None
    torch.testing.assert_close(model.model.norm.weight.grad, expected, rtol=1e-4, atol=1e-7)
    # The first step of Adam is the rate in each element, against the gradient's sign.
    torch.testing.assert_close(before - model.model.norm.weight.detach(), 1e-4 * expected.sign(), rtol=1e-2, atol=1e-8)


def test_only_low_rank_parts_learn():
    layer, entry = layer_of(["pivot", "dense", "pair"])
    model = nn.ModuleDict({"layer": layer, "norm": nn.LayerNorm(16).double()})
    student = Student(model, {"layer": entry}, [""], "low-rank")
    assert sorted(student.learning) == ["layer.lr_in.weight", "layer.lr_out_0.weight", "layer.lr_out_2.weight"]
    before = {name: tensor.clone() for name, tensor in student.model.state_dict().items()}
    optimizer = torch.optim.AdamW(list(student.learning.values()), 0.1, weight_decay=0.0)
    for _ in range(3):
        optimizer.zero_grad()
        student.model["layer"](torch.ones(2, 16, dtype=torch.float64)).square().sum().backward()
        optimizer.step()
    after = student.model.state_dict()
    assert torch.equal(after["layer.lr_in.weight"][5:17], before["layer.lr_in.weight"][5:17])
    assert not torch.equal(after["layer.lr_in.weight"][:5], before["layer.lr_in.weight"][:5])
    found = student.finish(torch.float64)
    assert torch.equal(found["layer.lr_in.weight"][5:17], before["layer.lr_in.weight"][5:17])
    assert torch.equal(found["layer.bias"], before["layer.bias"])
