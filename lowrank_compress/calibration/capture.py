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
from pathlib import Path

import torch
from torch import Tensor

from lowrank_compress.arch.resolve import Target
from lowrank_compress.calibration.hooks import hooked
from lowrank_compress.calibration.moments import ROWS, Moments
from lowrank_compress.calibration.statistics import STATISTICS, enough_tokens, statistic_key
from lowrank_compress.errors import InputError
from lowrank_compress.model.skeleton import Skeleton
from lowrank_compress.model.walk.batch import Batch
from lowrank_compress.model.walk.head import lm_chunks, token_loss
from lowrank_compress.model.walk.replay import Replay
from lowrank_compress.model.walk.states import State, StateStore
from lowrank_compress.resources.resources import Resources

Wanted = Mapping[str, frozenset[str]]
Advance = Callable[[str, int, int], None]


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
    boundary = boundary_bytes(skeleton, own)
    spill = boundary * boundaries(count, wanted) > memory
    replay = Replay(skeleton, own, StateStore(spill, spill_to))
    tokens = sum(batch.tokens for batch in batches)
    losses = sum(loss_terms(batch) for batch in batches)
    halves = halves and sum(len(batch.ids) for batch in batches) > 1
    halved = halved_statistics(skeleton.resolved.targets, wanted, tokens) if halves else frozenset()
    first = first_counts(batches) if halved else (0, 0)
    sweep = _Sweep(replay, wanted, [i for i in range(count) if not skip(i)], clip, advance, halved)
    hidden = replay.start()
    if needs_gradient(wanted):
        found = sweep.backwards(hidden, segment_length(count, (disk if spill else memory) // boundary))
    else:
        found = sweep.forwards(hidden)
    held = None
    for number, (block, moments) in enumerate(found):
        owner = number % workers.count
        means = moments.means(tokens, losses, workers, owner, first)
        if owner == workers.rank:
            held = BlockStatistics(block, means)
        del moments, means
        if held is not None and (owner == workers.count - 1 or number == len(sweep.wanted_blocks) - 1):
            yield held
            held = None


@dataclass(frozen=True)
class _Sweep:
    """Runs all blocks over some batches, and takes the sums of those that are wanted."""

    replay: Replay
    wanted: Wanted
    wanted_blocks: Sequence[int]
    clip: float | None
    advance: Advance
    halved: frozenset[str] = frozenset()

    def forwards(self, hidden: list[State]) -> Iterator[tuple[int, Moments]]:
        """Measure on the way from the first block to the last."""
        replay, skeleton = self.replay, self.replay.skeleton
        for index in range(max(self.wanted_blocks, default=-1) + 1):
            moments = self._moments(index)
            with torch.no_grad(), skeleton.block(index, then=index + 1) as block:
                for number, batch in enumerate(replay.batches):
                    entering = replay.load(hidden[number])
                    with hooked(skeleton, index, moments, batch, clip=None):
                        leaving = replay.step(index, block, number, entering)
                    if moments is not None:
                        moments.add_influence(entering, leaving, batch.mask)
                    hidden[number] = replay.store.keep(leaving)
            self.advance("forward", index + 1, len(skeleton.resolved.blocks))
            if moments is not None:
                yield index, moments

    def backwards(self, hidden: list[State], segment: int) -> Iterator[tuple[int, Moments]]:
        """Sweep forwards, keep what enters every `segment`-th block, and measure on the way back."""
        replay, batches = self.replay, self.replay.batches
        count = len(replay.skeleton.resolved.blocks)
        entering: dict[int, list[State]] = {}
        for index in range(count):
            if index % segment == 0:
                entering[index] = hidden
            hidden = self._forward(index, hidden)
            self.advance("forward", index + 1, count)
        gradients: list[State] = []
        for number, batch in enumerate(batches):
            gradients.append(replay.store.keep(head_gradient(replay, batch, replay.load(hidden[number]))))
            self.advance("loss", number + 1, len(batches))
        replay.skeleton.drop_outside()
        del hidden
        for index in range(count - 1, min(self.wanted_blocks, default=count) - 1, -1):
            for earlier in range(max(entering), index):
                entering[earlier + 1] = self._forward(earlier, entering[earlier])
            moments = self._reverse(index, entering.pop(index), gradients)
            self.advance("backward", count - index, count)
            if moments is not None:
                yield index, moments

    def _moments(self, index: int) -> Moments | None:
        targets = self.replay.skeleton.resolved.of_block(index)
        return Moments(targets, self.wanted, self.halved) if index in self.wanted_blocks else None

    def _forward(self, index: int, hidden: list[State]) -> list[State]:
        with torch.no_grad(), self.replay.skeleton.block(index, then=index + 1) as block:
            return [self.replay.advance(index, block, number, state) for number, state in enumerate(hidden)]

    def _reverse(self, index: int, entering: list[State], gradients: list[State]) -> Moments | None:
        """Take a block's sums, and replace in place the gradients at its output by those at its input."""
        replay, skeleton = self.replay, self.replay.skeleton
        moments = self._moments(index)
        with skeleton.block(index, then=index - 1) as block:
            for number, batch in enumerate(replay.batches):
                x = replay.load(entering[number]).detach().requires_grad_()
                with hooked(skeleton, index, moments, batch, self.clip), torch.enable_grad():
                    out = replay.step(index, block, number, x)
                    (gradient,) = torch.autograd.grad(out, x, replay.load(gradients[number]))
                if moments is not None:
                    moments.add_influence(x, out, batch.mask)
                gradients[number] = replay.store.keep(gradient)
        return moments


def boundary_bytes(skeleton: Skeleton, batches: Sequence[Batch]) -> int:
    """Bytes of the hidden states of all batches between two blocks."""
    positions = sum(batch.ids.numel() for batch in batches)
    return positions * skeleton.model.config.hidden_size * skeleton.dtype.itemsize


def boundaries(blocks: int, wanted: Wanted) -> int:
    """How many boundaries between blocks have their states kept at once; with gradients, theirs count too."""
    return _kept(blocks, 1) if needs_gradient(wanted) else 1


def segment_length(blocks: int, limit: int) -> int:
    """Every how many blocks states are kept, so that no more than `limit` boundaries are at once, or else the fewest.

    All blocks of a segment are run a second time where it is longer than 1.
    """
    lengths = range(1, blocks + 1)
    return next((s for s in lengths if _kept(blocks, s) <= limit), min(lengths, key=lambda s: _kept(blocks, s)))


def _kept(blocks: int, segment: int) -> int:
    """Boundaries at once: starts of segments, the inside of one, and the gradients of one before and after a block."""
    return -(-blocks // segment) + segment - 1 + 2


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
    halves = [_even(batch) for batch in batches]
    return sum(half.tokens for half in halves), sum(loss_terms(half) for half in halves)


def _even(batch: Batch) -> Batch:
    ids, mask, labels = (
        None if part is None else part[batch.first % 2 :: 2] for part in (batch.ids, batch.mask, batch.labels)
    )
    assert ids is not None
    return Batch(ids, mask, labels)


def loss_terms(batch: Batch) -> int:
    """How many terms the summed loss of a batch has: scored tokens, or examples."""
    if batch.labels is not None:
        return len(batch.labels)
    return batch.ids.shape[0] * (batch.ids.shape[1] - 1)


def head_gradient(replay: Replay, batch: Batch, hidden: Tensor) -> Tensor:
    """Gradient of the summed loss in the hidden states that leave the last block, (sequences, length, width).

    The logits of a language model are made for a chunk of positions at a time.

    Raises
    ------
    NumericsError
        A logit is not finite.
    """
    if batch.labels is not None:
        leaf = hidden.detach().requires_grad_()
        with torch.enable_grad():
            loss = token_loss(replay.head(batch, leaf), batch.labels, "the calibration set")
        return torch.autograd.grad(loss, leaf)[0]
    gradient = torch.zeros_like(hidden)
    for start, stop in lm_chunks(batch):
        leaf = hidden[:, start:stop].detach().requires_grad_()
        padded = Batch(batch.ids[:, start:stop])
        with torch.enable_grad():
            loss = token_loss(replay.head(padded, leaf), batch.ids[:, start + 1 : stop + 1], "the calibration set")
        gradient[:, start:stop] = torch.autograd.grad(loss, leaf)[0]
    return gradient
