"""Which of several whole plans to take: that which changes the model's predictions least on text kept out of the fits.

Predicted losses are of second order and of one group at a time: right in order at small ratios, too low at large ones.
So whole plans are tried, each as the dense model with its matrices replaced by what they would become, one block in
memory at a time, and the least Kullback-Leibler divergence to the dense model wins. It is taken on windows of the text
that come after the calibration set, and, with less weight, on windows of tokens drawn at random: what was fitted to one
domain should not ruin all others.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lowrank_compress.allocation.choice import Choice
from lowrank_compress.allocation.curve import Curve
from lowrank_compress.allocation.uniform import allocate as uniform
from lowrank_compress.arch.targets import Target
from lowrank_compress.errors import InputError, UnsupportedError
from lowrank_compress.evaluation.divergence import divergences_at_the_end
from lowrank_compress.methods.edit import Replacement, Rerouted, Source
from lowrank_compress.methods.groups import TargetGroup
from lowrank_compress.model.narrowing import check_narrowing
from lowrank_compress.model.skeleton import Skeleton
from lowrank_compress.model.walk.batch import Batch
from lowrank_compress.model.walk.states import StateStore
from lowrank_compress.model.walk.walk import Walk
from lowrank_compress.resources.memory import trim
from lowrank_compress.shipped.router import prune_router, restore_router
from lowrank_compress.stages.cachebudget import choose_cache
from lowrank_compress.stages.choose import MUCH
from lowrank_compress.stages.decompose import Bases

# Weight of the divergence on tokens drawn at random, beside that on text.
FAR = 0.5
# In large models no plan is tried that is predicted, by the same losses, to lose so many times what the first one does,
# and of the others no more than so many.
HOPELESS, RIVALS = 2.0, 2
FIRST, SECOND, SCALED = "held-out losses", "second allocation", "scaled losses"
BY_SEQUENCE = "losses scaled by sequence"


@dataclass(frozen=True, eq=False)
class Plan:
    """One way to compress the whole model.

    Attributes
    ----------
    name
        For reports.
    bases
        The decompositions that it is made of.
    groups, choices
        Which groups, and the choice of each by its name.
    predicted
        Σ of the predicted losses.
    """

    name: str
    bases: Bases
    groups: tuple[TargetGroup, ...]
    choices: Mapping[str, Choice]
    predicted: float


def plans_of(bases: Bases) -> list[Plan]:
    """Plan in every way that is worth trying; the first is that of the allocator, by the best knowledge of losses.

    One way is enough where nothing was asked of other text. Trials of large models cost more than they tell of plans
    that lose `HOPELESS` times as much as the first one, by the same prediction: the `RIVALS` of least loss are tried.
    """
    chooser, curves = bases.chooser, bases.curves()
    plans = [planned(FIRST, bases, curves, chooser.choose(curves), chooser.allocate)]
    if not chooser.config.held_out or not chooser.allocator.needs_loss:
        return plans
    if bases.halved():
        sample = bases.curves(on_sample=True)
        plans.append(planned("losses on the sample", bases, sample, chooser.choose(sample), chooser.allocate))
    rivals = []
    for name, position in (("linear only", 0), ("modules", -1)):
        groups = chooser.of_position(position)
        ways = [("", chooser.allocate), (", uniform", partial(uniform, limit=chooser.budget.limit))]
        for how, allocate in ways[:1] if chooser.allocator.alike else ways:
            with contextlib.suppress(InputError):  # out of reach
                plan = planned(f"{name}{how}", bases, curves, groups, allocate)
                if chooser.small or plan.predicted <= HOPELESS * plans[0].predicted:
                    rivals.append(plan)
    plans = different([*plans, *rivals])
    if not chooser.small:
        plans = [plans[0], *sorted(plans[1:], key=lambda plan: plan.predicted)[:RIVALS]]
    if scales := bases.scales():
        plans.append(scaled_plan(bases, scales, BY_SEQUENCE))
    if bases.rival is not None and chooser.config.ratio >= MUCH:
        with contextlib.suppress(InputError):
            found = bases.rival.curves()
            groups = bases.rival.chooser.choose(found)
            plans.append(planned("narrower modules", bases.rival, found, groups, bases.rival.chooser.allocate))
    return different(plans)


def different(plans: Sequence[Plan]) -> list[Plan]:
    """Leave the first of several that choose the same."""
    return [plan for number, plan in enumerate(plans) if all(plan.choices != other.choices for other in plans[:number])]


def second_plan(bases: Bases) -> Plan:
    """Plan as first, with the decompositions of a second look."""
    chooser, curves = bases.chooser, bases.curves()
    return planned(SECOND, bases, curves, chooser.choose(curves), chooser.allocate)


def scaled_plan(bases: Bases, scales: Mapping[str, float], name: str = SCALED) -> Plan:
    """Plan as first, with the losses of each group multiplied by a number of its own."""
    chooser = bases.chooser
    curves = {each: replace(curve, loss=curve.loss * scales[each]) for each, curve in bases.curves().items()}
    return planned(name, bases, curves, chooser.choose(curves), chooser.allocate)


def planned(
    name: str,
    bases: Bases,
    curves: Mapping[str, Curve],
    groups: tuple[TargetGroup, ...],
    allocate: Callable[[Sequence[Curve]], np.ndarray],
) -> Plan:
    """Plan by curves: an allocator chooses points of those of some groups, and what the cache keeps is chosen too."""
    own = [curves[group.name] for group in groups]
    bases.chooser.budget.check(own)
    chosen = allocate(own)
    choices = {curve.name: curve.choice(point) for curve, point in zip(own, chosen, strict=True)}
    predicted = float(sum(curve.loss[point] for curve, point in zip(own, chosen, strict=True)))
    cache, lost = choose_cache(bases.chooser.config, bases.chooser.subject.cache, curves)
    return Plan(name, bases, (*groups, *bases.chooser.cache), choices | cache, predicted + lost)


def tried(bases: Bases, batches: Sequence[Batch], plans: Sequence[Plan]) -> list[dict[str, Any]]:
    """Try plans, and return what each came to, for the report; not those whose narrower modules cannot be run."""
    skeleton = bases.dense()
    if any(plan.bases is bases.rival for plan in plans):
        try:
            check_narrowing(skeleton, batches[0])
        except UnsupportedError:
            plans = [plan for plan in plans if plan.bases is not bases.rival]
    found = [divergences(skeleton, batches, plans)]
    far = drawn_at_random(batches, skeleton.model.config.vocab_size) if skeleton.task == "lm" else []
    if far:
        found.append(divergences(skeleton, far, plans))
    return [
        {"plan": plan.name, "divergence": values[0], "at_random": values[1] if far else None}
        for plan, *values in zip(plans, *found, strict=True)
    ]


def best(plans: Sequence[Plan], found: Sequence[Mapping[str, Any]]) -> Plan:
    """Return the plan of least divergence, of equal ones the first; of plans that were not tried, the first."""
    totals = {trial["plan"]: trial["divergence"] + FAR * (trial["at_random"] or 0.0) for trial in found}
    return min(plans, key=lambda plan: totals.get(plan.name, float("inf")))


def edited(plan: Plan, beside: Skeleton | None = None) -> Skeleton:
    """Make a plan's result: the dense model, one block at a time, with other matrices in it.

    Parameters
    ----------
    beside
        The dense model, where it is in memory at the same time.
    """
    bases = plan.bases

    def edit(index: int, block: nn.Module) -> None:
        _put(made, replacements(plan, index, bases.device), bases.files.directory)

    made = Skeleton(
        bases.chooser.subject.checkpoint,
        bases.device,
        torch.float32,
        edit,
        beside,
        None if beside is None else beside.for_experts,
    )
    return made


def drawn_at_random(batches: Sequence[Batch], vocabulary: int, seed: int = 0) -> list[Batch]:
    """Half as many windows as there are, of random tokens; each begins with the token that all windows begin with."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for batch in batches:
        ids = torch.randint(vocabulary, batch.ids.shape, generator=generator)[: (len(batch.ids) + 1) // 2]
        if bool((batch.ids[:, 0] == batch.ids[0, 0]).all()):
            ids[:, 0] = batch.ids[0, 0]
        found.append(Batch(ids))
    return found


def divergences(skeleton: Skeleton, batches: Sequence[Batch], plans: Sequence[Plan]) -> list[float]:
    """Mean Kullback-Leibler divergence of each plan's predictions from the dense model's, in nats; inf if not finite.

    Parameters
    ----------
    skeleton
        The dense model.
    batches
        Windows of text, or examples for a classifier.
    plans
        All for this model.
    """
    walk = Walk([skeleton] * (1 + len(plans)), batches)  # the dense model, and what each plan makes of it
    for step in walk.forwards():
        for model, plan in enumerate(plans, start=1):
            with in_place_of(skeleton, replacements(plan, step.index, skeleton.device), plan.bases.files.directory):
                step.advance(model)
            trim()
    return divergences_at_the_end(walk)


@contextlib.contextmanager
def in_place_of(
    skeleton: Skeleton, replacements: Iterable[Replacement | Rerouted], directory: Path | None = None
) -> Iterator[None]:
    """Put matrices and biases into the block in memory, for a while.

    Parameters
    ----------
    directory
        Where those of lent experts lie meanwhile; None for the system's temporary one.
    """
    with _put(skeleton, replacements, directory):
        yield


def _put(
    skeleton: Skeleton, replacements: Iterable[Replacement | Rerouted], directory: Path | None
) -> contextlib.ExitStack:
    """Put matrices and biases into the block in memory; what is returned puts back what was there."""
    undo, changed = contextlib.ExitStack(), set[str]()
    store = StateStore(True, directory)

    def put(name: str, values: Tensor, target: Target) -> None:
        lent = skeleton.lends(name)
        tensor = skeleton.parameter(name)
        if lent or name not in changed:
            tensor = tensor.clone()
        stored = tensor.T if target.view.transposed and tensor.ndim == 2 else tensor
        stored[target.view.rows.index().to(stored.device)] = values.to(stored)
        if lent:
            before = skeleton.lend(name, store.keep(tensor).load)
            undo.callback(skeleton.lend, name, before)
        elif name not in changed:
            parameter = skeleton.model.get_parameter(name)
            undo.callback(setattr, parameter, "data", parameter.data)
            parameter.data = tensor
        changed.add(name)

    for found in replacements:
        if isinstance(found, Rerouted):
            router = skeleton.model.get_submodule(found.path)
            undo.callback(restore_router, router, dict(router.named_parameters()))
            prune_router(router, found.kept)
            continue
        put(found.target.parameter, found.weight, found.target)
        if found.bias is not None and found.target.bias is not None:
            put(found.target.bias, found.bias, found.target)
    return undo


def replacements(plan: Plan, block: int, device: torch.device) -> Iterator[Replacement | Rerouted]:
    """What a plan makes of a block, in the dense model's shapes, one after the other."""
    tensors, read = plan.bases.files.read(block), plan.bases.chooser.subject.model
    source = Source(read.weight, read.bias, device, torch.float32)
    for group in plan.groups:
        choice = plan.choices[group.name]
        if group.block == block and not choice.is_dense:
            yield from group.replace(source, choice, tensors)
