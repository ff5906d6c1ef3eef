"""Walks against whole models as transformers runs them and autograd differentiates them."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lowrank_compress.errors import InputError
from lowrank_compress.model.blueprint import Blueprint
from lowrank_compress.model.checkpoint import Checkpoint
from lowrank_compress.model.skeleton import Skeleton
from lowrank_compress.model.walk.batch import Batch
from lowrank_compress.model.walk.states import StateStore
from lowrank_compress.model.walk.walk import Walk
from tests.ordinary import Saved, load, padded, summed_loss, task, tokens, watched

CASES = ["llama-lm", "gemma2-lm", "gpt2-lm", "phi3-lm", "bert-classification"]
CPU = torch.device("cpu")
LABELS = [2, 0, 1]
BLOCKS = 5


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return Saved(tmp_path_factory.mktemp("models"))


def deep(saved: Saved, case: str, blocks: int = BLOCKS) -> Path:
    """A checkpoint of so many blocks."""
    names = {"gpt2": "n_layer"}
    overrides: dict[str, Any] = {names.get(case.partition("-")[0], "num_hidden_layers"): blocks}
    if case == "gemma2-lm":
        overrides["layer_types"] = [("sliding_attention", "full_attention")[i % 2] for i in range(blocks)]
    return saved(case, **overrides)


def skeleton_of(path: Path) -> Skeleton:
    return Skeleton(Checkpoint(path), CPU, torch.float64)


def sequences() -> list[Tensor]:
    return tokens(11, 11, 7, seed=3)


def batches_of(case: str) -> list[Batch]:
    """The sequences in two batches; a classifier's second one is padded."""
    first, second, third = sequences()
    if task(case) == "lm":
        return [Batch(torch.stack([first, second])), Batch(third[None])]
    return [
        Batch(first[None], None, torch.tensor(LABELS[:1])),
        Batch(*padded([second, third]), torch.tensor(LABELS[1:])),
    ]


def change(block: nn.Module, seed: int) -> None:
    """Replace the matrices of a block by others, which depend on their names and a seed alone."""
    for name, parameter in block.named_parameters():
        if parameter.ndim > 1:
            generator = torch.Generator().manual_seed(seed + sum(name.encode()))
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data = parameter.data + 0.1 * noise


def whole(path: Path, case: str, blocks: Sequence[str], seeds: Sequence[int | None]) -> PreTrainedModel:
    """The whole model, in it each block changed by a seed, or not."""
    model = load(path, task(case))
    for name, seed in zip(blocks, seeds, strict=True):
        if seed is not None:
            change(model.get_submodule(name), seed)
    return model


def assert_close(found: Tensor, expected: Tensor, mask: Tensor | None = None) -> None:
    if mask is not None and found.ndim == 3:
        found, expected = found[mask.bool()], expected[mask.bool()]
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-11 * expected.abs().max()


def assert_logits(walk: Walk, number: int, model: int, expected: PreTrainedModel) -> None:
    batch = walk.batches[number]
    with torch.no_grad():
        found = walk.head(number, walk.leaving(number, model), model=model)
        assert_close(found, expected(input_ids=batch.ids, attention_mask=batch.mask).logits)


# --- Forwards


@pytest.mark.parametrize("case", CASES)
def test_two_models_side_by_side_one_of_them_changed_on_the_way(case: str, saved: Saved) -> None:
    teacher, student = (skeleton_of(path) for path in (deep(saved, case), deep(saved, case)))
    walk = Walk([teacher, student], batches_of(case))
    for step in walk.forwards():
        assert step.blocks[0] is not step.blocks[1]
        if step.index == 1:
            step.run(0, 1)  # what is run already keeps what the stored weights make of it …
            before = step.call(1, step.entering(1, 1), 1)
        change(step.blocks[1], step.index)
        if step.index == 1:
            assert not torch.equal(step.call(1, step.entering(1, 1), 1), before)
    names = teacher.resolved.blocks
    assert len(names) == BLOCKS
    for number in range(2):
        seeds = [index if (index, number) != (1, 0) else None for index in range(BLOCKS)]  # … and nothing else does
        assert_logits(walk, number, 0, load(deep(saved, case), task(case)))
        assert_logits(walk, number, 1, whole(deep(saved, case), case, names, seeds))


@pytest.mark.parametrize("case", CASES)
def test_one_model_with_several_sets_of_weights_is_read_once(
    case: str, saved: Saved, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, read = deep(saved, case), list[str]()
    skeleton, stock = skeleton_of(path), Blueprint.read
    monkeypatch.setattr(Blueprint, "read", lambda plan, name: (read.append(name), stock(plan, name))[1])
    walk = Walk([skeleton] * 3, batches_of(case))
    for step in walk.forwards():
        assert step.blocks[0] is step.blocks[1] is step.blocks[2]
        for model in (1, 2):
            kept = {name: parameter.data for name, parameter in step.blocks[0].named_parameters()}
            change(step.blocks[0], 10 * model)
            step.advance(model)
            for name, parameter in step.blocks[0].named_parameters():
                parameter.data = kept[name]
    inside = [name for name in read if name.startswith(tuple(f"{block}." for block in skeleton.resolved.blocks))]
    assert len(inside) == len(set(inside)) > 0
    for model, seed in enumerate([None, 10, 20]):
        expected = whole(path, case, skeleton.resolved.blocks, [seed] * BLOCKS)
        for number in range(2):
            assert_logits(walk, number, model, expected)


def test_a_model_fed_by_another_sees_what_enters_that_one(saved: Saved) -> None:
    teacher, student = skeleton_of(deep(saved, "llama-lm")), skeleton_of(deep(saved, "gemma2-lm"))
    walk = Walk([teacher, student], batches_of("llama-lm"), feeds=[0, 0])
    model, alone = load(deep(saved, "llama-lm"), "lm"), load(deep(saved, "gemma2-lm"), "lm")
    names = teacher.resolved.blocks
    for step in walk.forwards():
        for number, batch in enumerate(walk.batches):
            with watched(model, names) as seen, torch.no_grad():
                model(input_ids=batch.ids)
            entering = seen[names[step.index]][0]
            for _ in range(2):  # nothing goes on, so it may be run as often as one likes
                found, leaving = step.run(number, 1)
                assert_close(found, entering)
            handle = alone.get_submodule(names[step.index]).register_forward_pre_hook(
                lambda module, args, x=entering: (x, *args[1:])
            )
            with watched(alone, names) as seen, torch.no_grad():
                alone(input_ids=batch.ids)
            handle.remove()
            assert_close(leaving, seen[names[step.index]][1])
            step.run(number, 0)
            with pytest.raises(ValueError, match=f"Batch {number} has left block {step.index} of model 0"):
                step.entering(number, 1)


@pytest.mark.parametrize("backwards", [False, True])
def test_what_has_gone_on_does_not_go_on_again(backwards: bool, saved: Saved) -> None:
    walk = Walk([skeleton_of(saved("llama-lm"))], batches_of("llama-lm"))
    steps = walk.backwards() if backwards else walk.forwards()
    step = next(steps)
    step.run(1)
    step.entering(0)
    with pytest.raises(ValueError, match=r"Batch 1 has left block \d of model 0; expected it to enter"):
        step.run(1)


def test_what_the_caller_keeps_goes_on(saved: Saved) -> None:
    walk = Walk([skeleton_of(saved("llama-lm"))] * 2, batches_of("llama-lm"))
    for step in walk.forwards():
        step.keep(1, step.entering(1, 1), 1)  # skips the block
    steps = Walk(walk.models[:1], walk.batches).forwards()
    assert torch.equal(walk.leaving(1, 1), next(steps).entering(1))
    assert torch.equal(walk.leaving(0, 1), walk.leaving(0, 0))


def test_without_batches_the_blocks_come_in_order(saved: Saved) -> None:
    skeleton = skeleton_of(deep(saved, "llama-lm"))
    found = [step.index for step in Walk([skeleton]).forwards() if not next(step.blocks[0].parameters()).is_meta]
    assert found == list(range(BLOCKS))
    assert all(parameter.is_meta for parameter in skeleton.model.parameters())


def test_a_walk_may_end_early(saved: Saved) -> None:
    walk = Walk([skeleton_of(deep(saved, "llama-lm"))], batches_of("llama-lm"))
    assert [step.index for step in walk.forwards(until=2)] == [0, 1]
    half = walk.leaving(0)
    steps = walk.forwards()
    for step in steps:
        if step.index == 2:
            assert torch.equal(step.entering(0), half)
            break
    steps.close()
    assert all(parameter.is_meta for block in walk.models[0].blocks for parameter in block.parameters())


def test_models_that_do_not_go_together_are_refused(saved: Saved) -> None:
    models = [skeleton_of(deep(saved, "llama-lm")), skeleton_of(saved("llama-lm"))]
    with pytest.raises(InputError, match=r"have \[5, 2\] blocks; expected equally many"):
        Walk(models)
    for feeds in ([0], [1, 0], [0, 2], [0, -1], [0, 0, 0]):
        with pytest.raises(InputError, match=r"2 models are fed by .* expected one that feeds itself"):
            Walk(models[:1] * 2, feeds=feeds)


# --- Backwards


def everything(walk: Walk, model: int = 0, learn: bool = True, **options: Any) -> Iterator[tuple[str, Tensor]]:
    """Gradients at the input of every block, and in all its parameters, by names."""
    prefixes = walk.models[model].resolved.blocks
    last: list[Tensor] = []
    for step in walk.backwards(**options):
        assert not any(parameter.requires_grad for parameter in step.blocks[model].parameters())
        step.blocks[model].requires_grad_(learn)
        arriving = [step.gradient(number, model) for number in range(len(walk.batches))]
        for number, gradient in enumerate(arriving):
            assert gradient is not None
            assert step.index == walk.blocks - 1 or torch.equal(gradient, last[number])
            yield f"{prefixes[step.index]} {number}", gradient
            step.run(number, model)
        last = [step._gradients[model][number].load() for number in range(len(walk.batches))]  # type: ignore
        for name, parameter in step.blocks[model].named_parameters():
            assert (parameter.grad is not None) == learn
            if parameter.grad is not None:
                yield f"{prefixes[step.index]}.{name}", parameter.grad


def ordinary(path: Path, case: str, walk: Walk) -> dict[str, Tensor]:
    """The same of the whole model, by autograd: gradients at the outputs of blocks, and in parameters."""
    model, names = load(path, task(case)), walk.models[0].resolved.blocks
    found: dict[str, Tensor] = {}
    for number, batch in enumerate(walk.batches):
        with watched(model, names) as seen:
            out = model(input_ids=batch.ids, attention_mask=batch.mask).logits.double()
        if batch.labels is None:
            loss = nn.functional.cross_entropy(out[:, :-1].flatten(0, 1), batch.ids[:, 1:].flatten(), reduction="sum")
        else:
            loss = nn.functional.cross_entropy(out, batch.labels, reduction="sum")
        for name in names:
            seen[name][1].retain_grad()
        loss.backward()
        for name in names:
            gradient = seen[name][1].grad
            assert gradient is not None
            found[f"{name} {number}"] = gradient
    for name in names:
        for leaf, parameter in model.get_submodule(name).named_parameters():
            assert parameter.grad is not None
            found[f"{name}.{leaf}"] = parameter.grad
    return found


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_the_whole_model(case: str, saved: Saved) -> None:
    walk = Walk([skeleton_of(deep(saved, case))], batches_of(case))
    expected = ordinary(deep(saved, case), case, walk)
    found = dict(everything(walk))
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert_close(gradient, expected[name])


def test_the_loss_is_summed_over_sequences(saved: Saved) -> None:
    """What `ordinary` calls the loss is what is written down elsewhere, sequence by sequence."""
    model = load(saved("llama-lm"), "lm")
    walk = Walk([skeleton_of(saved("llama-lm"))], batches_of("llama-lm"))
    model.zero_grad()
    sum(summed_loss(model, ids, None)[0] for ids in sequences()).backward()  # type: ignore
    for name, gradient in everything(walk):
        if " " not in name:
            expected = model.get_parameter(name).grad
            assert expected is not None
            assert_close(gradient, expected)


def test_what_a_batch_was_differentiated_through_is_gone_when_the_next_one_runs(saved: Saved) -> None:
    """Else the activations of two batches, and all that hooks keep of them, would be in memory at once."""
    walk = Walk([skeleton_of(saved("llama-lm"))], batches_of("llama-lm"))
    seen: list[weakref.ref[Tensor]] = []

    def hook(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        kept = out.detach().clone()
        seen.append(weakref.ref(kept))
        out.register_hook(lambda gradient: gradient + 0 * kept)

    for step in walk.backwards():
        handle = step.blocks[0].get_submodule("mlp").register_forward_hook(hook)
        for number in range(2):
            entering, leaving = step.run(number)
            assert entering.shape == leaving.shape
            assert seen[-1]() is None
        handle.remove()
    assert len(seen) == 4


@pytest.mark.parametrize("learn", [False, True])
@pytest.mark.parametrize("segment", [1, 2, 3, BLOCKS, 9])
def test_where_states_lie_and_how_many_are_kept_changes_no_bit(
    segment: int, learn: bool, saved: Saved, tmp_path: Path
) -> None:
    path = deep(saved, "gemma2-lm")
    reference = dict(everything(Walk([skeleton_of(path)], batches_of("gemma2-lm")), learn=learn))
    for spill in (False, True):
        walk = Walk([skeleton_of(path)], batches_of("gemma2-lm"), store=StateStore(spill, tmp_path))
        found = dict(everything(walk, learn=learn, segment=segment))
        assert found.keys() == reference.keys()
        assert all(torch.equal(gradient, reference[name]) for name, gradient in found.items())


def test_spilled_states_of_two_models_are_the_same(saved: Saved, tmp_path: Path) -> None:
    found: list[list[Tensor]] = []
    for spill in (False, True):
        models = [skeleton_of(deep(saved, case)) for case in ("llama-lm", "gemma2-lm")]
        walk = Walk(models, batches_of("llama-lm"), store=StateStore(spill, tmp_path))
        for step in walk.forwards():
            change(step.blocks[1], step.index)
        found.append([walk.leaving(number, model) for number in range(2) for model in range(2)])
    assert all(torch.equal(first, second) for first, second in zip(*found, strict=True))


def test_a_student_learns_its_teachers_predictions(saved: Saved) -> None:
    """The loss may be any, here the divergence from another model; that one has no gradients."""
    teacher, student = deep(saved, "llama-lm"), deep(saved, "gemma2-lm")
    names = skeleton_of(student).resolved.blocks
    walk = Walk([skeleton_of(teacher), skeleton_of(student)], batches_of("llama-lm"))

    def divergence(expected: Tensor, got: Tensor) -> Tensor:
        return nn.functional.kl_div(got.log_softmax(-1), expected.softmax(-1), reduction="sum")

    def gradient(walk: Walk, number: int, model: int) -> Tensor | None:
        if model == 0:
            return None
        with torch.no_grad():
            expected = walk.head(number, walk.leaving(number, 0), model=0)
        leaf = walk.leaving(number, 1).detach().requires_grad_()
        return torch.autograd.grad(divergence(expected, walk.head(number, leaf, model=1)), leaf)[0]

    models = [load(path, "lm") for path in (teacher, student)]
    for batch in walk.batches:
        with torch.no_grad():
            expected = models[0](input_ids=batch.ids).logits
        divergence(expected, models[1](input_ids=batch.ids).logits).backward()
    visits = 0
    for step in walk.backwards(gradient):
        step.blocks[1].requires_grad_(True)
        for number in range(2):
            assert step.gradient(number, 0) is None
            entering, leaving = step.run(number, 0)  # as often as one likes: nothing goes back from it
            assert torch.equal(step.run(number, 0)[1], leaving)
            assert not leaving.requires_grad
            assert torch.equal(entering, step.entering(number, 0))
        step.advance(1)
        for leaf, parameter in step.blocks[1].named_parameters():
            expected = models[1].get_submodule(names[step.index]).get_parameter(leaf).grad
            assert parameter.grad is not None
            assert_close(parameter.grad, expected)
            visits += 1
    assert visits > BLOCKS


def test_the_caller_may_hand_back_gradients_of_its_own(saved: Saved) -> None:
    """A further loss at every block, here the mean of its output, adds to what comes from behind."""
    path = deep(saved, "llama-lm")
    walk = Walk([skeleton_of(path)], batches_of("llama-lm")[:1])
    model, names = load(path, "lm"), walk.models[0].resolved.blocks
    with watched(model, names) as seen:
        logits = model(input_ids=walk.batches[0].ids).logits
    loss = nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), walk.batches[0].ids[:, 1:].flatten(), reduction="sum"
    )
    total = loss + sum(seen[name][1].mean() for name in names)
    (expected,) = torch.autograd.grad(total, seen[names[0]][0])
    gradient = torch.zeros(())
    for step in walk.backwards():
        entering, arriving = step.entering(0).requires_grad_(), step.gradient(0)
        assert arriving is not None
        out = step.call(0, entering)
        (gradient,) = torch.autograd.grad((out * arriving).sum() + out.mean(), entering)
        step.keep(0, gradient)
    assert_close(gradient, expected)


def test_the_way_back_may_end_early_and_says_how_far_it_is(saved: Saved) -> None:
    walk = Walk([skeleton_of(deep(saved, "llama-lm"))], batches_of("llama-lm"))
    said: list[tuple[str, int, int]] = []
    visits = []
    for step in walk.backwards(until=3, advance=lambda *progress: said.append(progress)):
        assert len(said) == BLOCKS + 2
        visits.append(step.index)
    assert visits == [4, 3]
    assert said == [*(("forward", i, BLOCKS) for i in range(1, BLOCKS + 1)), ("loss", 1, 2), ("loss", 2, 2)]
    assert all(parameter.is_meta for parameter in walk.models[0].model.parameters())
