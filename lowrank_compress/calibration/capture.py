"""Take each block's statistics with one block in memory: forwards, and backwards where gradients are asked for.

Without gradients: one forward sweep that takes the statistics on its way. With gradients: a forward sweep that keeps
what enters each block; the head's loss and its gradient; then a reverse sweep that recomputes each block and takes
all its statistics at once. A block's statistics are handed on as soon as they are complete.

Hidden states lie in memory, or in a file where they would take too much of it; where the disk cannot hold them either,
only what enters every few blocks is kept, and the rest is computed once more. None of this changes a result.
"""

from __future__ import annotations

import itertools
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import Tensor

from lowrank_compress.arch.targets import Target
from lowrank_compress.calibration.again import Again
from lowrank_compress.calibration.hooks import hooked
from lowrank_compress.calibration.moments import Moments
from lowrank_compress.calibration.statistics import STATISTICS, enough_tokens, statistic_key
from lowrank_compress.calibration.sums import ROWS
from lowrank_compress.errors import InputError
from lowrank_compress.model.skeleton import Skeleton
from lowrank_compress.model.walk.batch import Batch
from lowrank_compress.model.walk.head import head_gradient, head_loss
from lowrank_compress.model.walk.segments import boundary_bytes, most_kept, segment_length
from lowrank_compress.model.walk.states import StateStore
from lowrank_compress.model.walk.step import Step
from lowrank_compress.model.walk.walk import Walk, gradient_of_loss
from lowrank_compress.resources.memory import trim
from lowrank_compress.resources.resources import Resources

Wanted = Mapping[str, frozenset[str]]
Advance = Callable[[str, int, int], None]
Told = Callable[[Batch, float], None]


@dataclass(frozen=True)
class BlockStatistics:
    """The complete statistics of one block.

    Attributes
    ----------
    block
        Its index.
    means
        ``<target or shared input>/<statistic>``, and ``influence`` of the block itself, (1,) -> float64 tensor on the
        CPU.
    """

    block: int
    means: dict[str, Tensor]


def needs_gradient(wanted: Wanted) -> bool:
    """Whether any statistic is one of gradients."""
    return any(STATISTICS[name].gradient for names in wanted.values() for name in names)


def capture(
    skeleton: Skeleton,
    batches: Sequence[Batch],
    wanted: Wanted,
    *,
    skip: Callable[[int], bool],
    clip: float | None = None,
    advance: Advance = lambda step, done, total: None,
    spill_to: Path | None = None,
    disk: int | None = None,
    resources: Resources = Resources(),
    halves: bool = False,
    again: Again | None = None,
    told: Told | None = None,
) -> Iterator[BlockStatistics]:
    """Yield the statistics of each block: first to last, or last to first where gradients are taken.

    Of several workers each runs its share of the batches. The statistics of as many blocks as there are workers are
    summed, one block for each, before any is yielded: so all have one to work on at the same time.

    Parameters
    ----------
    skeleton
        The dense model.
    batches
        The calibration set.
    wanted
        Target name -> the statistics it needs (`statistics.STATISTICS`).
    skip
        Tells which blocks are finished already: they are run, but not measured nor yielded.
    clip
        Scale token gradients whose norm exceeds `clip` times the mean norm of the non-zero ones of the same module and
        batch down to that; None clips nothing.
    advance
        Called with (step, done, total) as work proceeds.
    spill_to
        Directory for hidden states that do not fit in memory; None for the system's temporary one.
    disk
        Bytes that hidden states may take where they do not fit in memory; None for half of what is free, shared by all.
    resources
        What memory hidden states may take, and who shares the batches; all must be given the same.
    halves
        Take second moments also of the first half of the calibration set alone, where their dimension is large for
        its tokens (`statistics.enough_tokens`) and there are two sequences at least.
    again
        Take statistics of gradients from a second model as well, and give those of both together (`Again.combined`).
    told
        Called with a batch and a part of its summed loss, of a language model, until all is told; where no gradients
        are taken, the blocks are run to the last for it.

    Raises
    ------
    NumericsError
        Logits, activations or gradients are NaN or infinite.
    """
    workers = resources.workers
    if len(batches) < workers.count:
        raise InputError(
            f"The calibration set has {len(batches)} micro-batches for {workers.count} processes. Start fewer, or use "
            "a smaller --micro-batch."
        )
    batches = numbered(batches)
    own = workers.share(batches)
    memory = resources.for_states
    disk = shutil.disk_usage(spill_to or tempfile.gettempdir()).free // (2 * workers.count) if disk is None else disk
    count = len(skeleton.resolved.blocks)
    models = [skeleton] if again is None else [skeleton, again.edited]
    boundary = boundary_bytes(skeleton, own) * len(models)
    spill = boundary * boundaries(count, wanted) > memory
    tokens = sum(batch.tokens for batch in batches)
    losses = sum(batch.terms for batch in batches)
    halves = halves and sum(len(batch.ids) for batch in batches) > 1
    halved = halved_statistics(skeleton.resolved.targets, wanted, tokens) if halves else frozenset()
    first = first_counts(batches) if halved else (0, 0)
    walk = Walk(models, own, store=StateStore(spill, spill_to))
    sweep = _Sweep(walk, wanted, [i for i in range(count) if not skip(i)], clip, advance, halved, again, told)
    if needs_gradient(wanted):
        found = sweep.backwards(segment_length(count, (disk if spill else memory) // boundary))
    else:
        found = sweep.forwards()
    held = None
    for number, (block, moments) in enumerate(found):
        owner = number % workers.count
        means, *other = [part.means(tokens, losses, workers, owner, first) for part in moments]
        if owner == workers.rank:
            if again is not None:
                means = again.combined(skeleton.resolved.of_block(block), means, *other)
            held = BlockStatistics(block, means)
        del moments, means, other
        if held is not None and (owner == workers.count - 1 or number == len(sweep.wanted_blocks) - 1):
            yield held
            held = None


@dataclass(frozen=True)
class _Sweep:
    """Walks through all blocks of a model, and takes the sums of those that are wanted."""

    walk: Walk
    wanted: Wanted
    wanted_blocks: Sequence[int]
    clip: float | None
    advance: Advance
    halved: frozenset[str] = frozenset()
    again: Again | None = None
    told: Told | None = None

    def forwards(self) -> Iterator[tuple[int, list[Moments]]]:
        """Measure on the way from the first block to the last."""
        until = None if self.told is not None else max(self.wanted_blocks, default=-1) + 1
        for step in self.walk.forwards(until=until):
            moments = self._measure(step, clip=None)
            self.advance("forward", step.index + 1, self.walk.blocks)
            if moments is not None:
                yield step.index, moments
        if self.told is not None:
            for number, batch in enumerate(self.walk.batches):
                self.told(batch, head_loss(self.walk.replay(), batch, self.walk.leaving(number)))
            self.walk.models[0].drop_outside()

    def backwards(self, segment: int) -> Iterator[tuple[int, list[Moments]]]:
        """Measure on the way back, with the gradients of the loss."""
        first = min(self.wanted_blocks, default=self.walk.blocks)
        loss = self._gradient if self.again is None else self.again.gradient
        for step in self.walk.backwards(loss, segment=segment, until=first, advance=self.advance):
            moments = self._measure(step, self.clip)
            self.advance("backward", self.walk.blocks - step.index, self.walk.blocks)
            if moments is not None:
                yield step.index, moments

    def _gradient(self, walk: Walk, number: int, model: int) -> Tensor:
        """As `gradient_of_loss`, and tell what the loss is."""
        told, batch = self.told, walk.batches[number]
        if told is None:
            return gradient_of_loss(walk, number, model)
        tell = partial(told, batch)
        return head_gradient(walk.replay(model), batch, walk.leaving(number, model), told=tell)

    def _measure(self, step: Step, clip: float | None) -> list[Moments] | None:
        """Take a block's sums if they are wanted, and let the block go: what is made of them needs the memory."""
        found, skeleton = None, self.walk.models[0]
        if step.index in self.wanted_blocks:
            targets = skeleton.resolved.of_block(step.index)
            moments = Moments(targets, self.wanted, self.halved)
            found = [moments]
            for number, batch in enumerate(self.walk.batches):
                with hooked(skeleton, step.index, moments, batch, clip):
                    entering, leaving = step.run(number)
                moments.add_influence(entering, leaving, batch.mask)
            if self.again is not None:
                found.append(Moments(targets, of_gradients(self.wanted), self.halved))
                self.again.measure(self.walk, step, found[-1], clip)
        step.leave()
        trim()
        return found


def of_gradients(wanted: Wanted) -> Wanted:
    """Leave those that are of gradients."""
    return {target: frozenset(name for name in names if STATISTICS[name].gradient) for target, names in wanted.items()}


def boundaries(blocks: int, wanted: Wanted) -> int:
    """How many boundaries between blocks have their states kept at once; with gradients, theirs count too."""
    return most_kept(blocks, 1) if needs_gradient(wanted) else 1


def numbered(batches: Sequence[Batch]) -> list[Batch]:
    """Tell every batch the number of its first sequence."""
    starts = itertools.accumulate((len(batch.ids) for batch in batches), initial=0)
    return [replace(batch, first=first) for batch, first in zip(batches, starts, strict=False)]


def halved_statistics(targets: Sequence[Target], wanted: Wanted, tokens: int) -> frozenset[str]:
    """Keys of the second moments that have too few tokens for their dimension to tell losses on the same sample."""
    return frozenset(
        statistic_key(target, name)
        for target in targets
        for name in wanted.get(target.name, frozenset())
        if name in ROWS and tokens < enough_tokens(STATISTICS[name].shape(target)[0])
    )


def first_counts(batches: Sequence[Batch]) -> tuple[int, int]:
    """Tokens and loss terms of the even sequences of a calibration set."""
    halves = [half_of(batch, 0) for batch in batches]
    return sum(half.tokens for half in halves), sum(half.terms for half in halves)


def half_of(batch: Batch, half: int) -> Batch:
    """Take the sequences of a batch that belong to a half of the calibration set: the even (0) or the odd ones (1)."""
    ids, mask, labels = (
        None if part is None else part[(batch.first + half) % 2 :: 2] for part in (batch.ids, batch.mask, batch.labels)
    )
    assert ids is not None
    return Batch(ids, mask, labels, outputs=batch.outputs, paired=batch.paired)
