"""The divergence between models equals that of whole models, and an edited skeleton is another model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lowrank_compress.evaluation.divergence import divergences
from lowrank_compress.model.checkpoint import Checkpoint
from lowrank_compress.model.skeleton import Skeleton
from lowrank_compress.model.walk.batch import Batch
from lowrank_compress.model.walk.head import tokens_at_once
from lowrank_compress.model.walk.walk import Walk, gradient_of_loss
from tests.ordinary import CLASSIFIERS, LM, Saved, load, tokens

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return Saved(tmp_path_factory.mktemp("models"))


@torch.no_grad()
def halve_the_first(index: int, block: nn.Module) -> None:
    """Change one block's weights, by what is there."""
    if index == 1:
        for parameter in block.parameters():
            parameter.mul_(0.5)


@pytest.mark.parametrize("case", [LM[0], CLASSIFIERS[0]])
def test_it_equals_that_of_whole_models(case: str, saved: Saved) -> None:
    path, task = saved(case), "lm" if case in LM else "classification"
    dense = Skeleton(Checkpoint(path), CPU, torch.float64)
    edited = Skeleton(Checkpoint(path), CPU, torch.float64, halve_the_first)
    ids = tokens(24, seed=3)[0].reshape(2, 12)
    batches = [Batch(ids[:1]), Batch(ids[1:])] if task == "lm" else [Batch(ids, labels=torch.tensor([0, 1]))]
    same, found = divergences([dense, dense, edited], batches)
    models = [load(path, task), load(path, task)]
    halve_the_first(1, models[1].get_submodule(dense.resolved.blocks[1]))
    with torch.no_grad():
        one, other = (model(input_ids=ids).logits.double().log_softmax(-1) for model in models)
    if task == "lm":
        one, other = one[:, :-1], other[:, :-1]
    assert same == pytest.approx(0, abs=1e-12)
    assert found > 1e-6
    assert found == pytest.approx(float((one.exp() * (one - other)).sum(-1).mean()), rel=1e-6)


def test_an_edited_model_is_walked_backwards_too(saved: Saved) -> None:
    path = saved(LM[0])
    edited = Skeleton(Checkpoint(path), CPU, torch.float64, halve_the_first)
    ids = tokens(12, seed=4)[0].reshape(1, 12)
    model = load(path, "lm").double()
    halve_the_first(1, model.get_submodule(edited.resolved.blocks[1]))
    entered: list[torch.Tensor] = []
    first = model.get_submodule(edited.resolved.blocks[0])
    first.register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    logits = model(input_ids=ids).logits[0, :-1]
    expected = torch.autograd.grad(nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"), entered[0])[0]
    walk = Walk([edited], [Batch(ids)])
    for step in walk.backwards(gradient_of_loss):
        if step.index == 0:
            hidden = step.entering(0).requires_grad_()
            out = step.call(0, hidden)
            found = torch.autograd.grad(out, hidden, step.gradient(0))[0]
            torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


def test_of_a_large_vocabulary_few_logits_are_in_memory() -> None:
    assert [tokens_at_once(size) for size in (2, 32_768, 151_936, 1 << 30)] == [512, 512, 110, 1]


def test_what_lies_outside_the_blocks_of_two_models_is_in_memory_once(saved: Saved) -> None:
    dense = Skeleton(Checkpoint(saved(LM[0])), CPU, torch.float32)
    edited = Skeleton(Checkpoint(saved(LM[0])), CPU, torch.float32, halve_the_first, beside=dense)
    other = Skeleton(Checkpoint(saved(LM[0])), CPU, torch.float64, beside=dense)
    names = dense.blueprint.outside()
    for name in names:
        there = dense.model.get_parameter(name).data_ptr()
        assert edited.model.get_parameter(name).data_ptr() == there
        assert other.model.get_parameter(name).data_ptr() != there
    dense.drop_outside()
    assert not any(edited.model.get_parameter(name).is_meta for name in names)
    edited.drop_outside()
    edited.load_outside()
    assert all(dense.model.get_parameter(name).is_meta for name in names)
    assert not any(edited.model.get_parameter(name).is_meta for name in names)
