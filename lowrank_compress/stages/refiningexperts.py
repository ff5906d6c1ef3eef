"""The routed experts of a block of a compressed model, fitted anew to what the dense one's do.

All experts of a block see their inputs at once: gate and up of all are fitted first, then all that read their hidden
units. An expert is fitted on the tokens that the compressed model's router sends it, to what the dense model's expert
makes of these very tokens there (of one that stands for others, to what each of these makes of its own), plus what the
residual stream lacks behind the experts (`expertlooks.lacking`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor

from lowrank_compress.arch.targets import Target
from lowrank_compress.calibration.expertlooks import lacking, look_at_experts
from lowrank_compress.calibration.experts import Routing
from lowrank_compress.calibration.pairs import PairSums
from lowrank_compress.linalg.refine import Sample
from lowrank_compress.model.walk.batch import Batch
from lowrank_compress.model.walk.step import Step
from lowrank_compress.shipped.experts import SeparateExperts
from lowrank_compress.shipped.fusion import ROLES


class ExpertMap(Protocol):
    """A matrix of an expert that is to be fitted."""

    @property
    def target(self) -> Target:
        """In the dense model."""
        ...

    @property
    def writes(self) -> bool:
        """Whether it emits the expert's output."""
        ...


EachMap = TypeVar("EachMap", bound=ExpertMap)


def fit_experts(
    step: Step,
    batches: Sequence[Batch],
    block: str,
    place: str | None,
    routed: Sequence[EachMap],
    fit: Callable[[Sequence[EachMap], tuple[Sample, Sample]], None],
    room: int,
) -> None:
    """Fit all routed experts of a block: what reads their inputs, and then what reads their hidden units.

    Parameters
    ----------
    step, batches, place
        As of `expert_sums`.
    block
        Path of the block, with a point behind it.
    routed
        The matrices.
    fit
        Called with those of an expert that read the same, and their sums.
    room
        Bytes of the sums of those experts that are measured in one go; it changes no result.
    """
    for down in (False, True):
        own: dict[int, list[EachMap]] = {}
        for each in routed:
            if each.writes == down and each.target.expert is not None:
                own.setdefault(each.target.expert, []).append(each)
        longest = max((max(each.target.shape) for each in routed), default=1)
        path = routed[0].target.module.rsplit(".", 2)[0].removeprefix(block)
        for some in portions(sorted(own), longest, room):
            for number, halves in expert_sums(step, batches, path, place, some, down=down).items():
                fit(own[number], halves)


def portions(experts: Sequence[int], size: int, room: int) -> Iterator[Sequence[int]]:
    """Divide experts into as many as are measured at once; `size` is the longest side of their matrices."""
    count = max(1, room // sums_bytes(size))
    for start in range(0, len(experts), count):
        yield experts[start : start + count]


def sums_bytes(size: int) -> int:
    """Bytes of the sums of one expert, of whose matrices `size` is the longest side."""
    return 4 * size**2 * torch.float64.itemsize


def expert_sums(
    step: Step, batches: Sequence[Batch], path: str, place: str | None, experts: Sequence[int], *, down: bool
) -> dict[int, tuple[Sample, Sample]]:
    """Take the sums that experts' matrices need, over both halves of the text, by number; none of unseen experts.

    Parameters
    ----------
    step
        With the dense model's block and the compressed one's.
    batches
        The calibration set.
    path
        Of the experts, below the block.
    place
        Where the residual stream can be seen that they are added to, as `look_at_experts` takes it.
    experts
        Numbers.
    down
        Whether it is for the matrices that emit their outputs, beside the dense model's biases; else for those that
        read their inputs.
    """
    theirs, own = (cast(SeparateExperts, block.get_submodule(path)) for block in step.blocks[:2])
    sums, seen = {number: PairSums() for number in experts}, set[int]()
    for number, batch in enumerate(batches):
        there, here = (look_at_experts(step, number, model, path, place) for model in (0, 1))
        owed = lacking(theirs, there, here) if down else 0.0
        routing = Routing(batch).chosen(here.index, here.weights)
        for expert, member in ((each, member) for each in experts for member in own.members(each)):
            routed = routing.of(member)
            tokens = routed.tokens
            if not len(tokens):
                continue
            seen.add(expert)
            inputs, targets = here.x[tokens], there.x[tokens]
            if down:
                inputs = _called(own.get_submodule(str(expert)).hidden, inputs)
                targets = _called(theirs.get_submodule(str(member)), targets)
                targets = targets + (owed[tokens] if isinstance(owed, Tensor) else owed)
                if theirs.fusion.biased:
                    targets = targets - step.parameter(f"{path}.{expert}.{ROLES[-1]}.bias")
            parts = Batch(routed.real.long(), routed.real, first=batch.first)
            sums[expert].add(parts, routed.spread(inputs), routed.spread(targets))
    return {number: each.samples() for number, each in sums.items() if number in seen}


@torch.no_grad()
def _called(function: Any, x: Tensor) -> Tensor:
    return function(x)
