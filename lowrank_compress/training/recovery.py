"""The whole of a training: a learning rate found by trial, the steps, and the best of what they came by."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lowrank_compress.model.walk.batch import Batch
from lowrank_compress.resources.workers import Workers
from lowrank_compress.training.loss import Loss, mean_loss
from lowrank_compress.training.trainer import Data, Trainer

# Rates, of which neighbours are tried from one on towards the better side; and for how many steps, with a schedule of
# their own.
RATES, FIRST, TRIED_STEPS = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2), 3, 16
# The more steps, the larger the rate that is best; so the largest is taken that gains this share of what the best does.
NEAR = 0.75
# Steps between two looks at what is held out, each of which may become the result.
EVERY = 25


class Shelf(Protocol):
    """Keeps states of a training where a process that is started anew finds them."""

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Return what was saved last; None if nothing was."""
        ...

    def save(self, tensors: Mapping[str, Tensor], notes: Mapping[str, Any]) -> None:
        """Keep this instead of what was saved before."""
        ...


@dataclass(frozen=True)
class Asked:
    """How long to train, and how fast.

    Attributes
    ----------
    steps
        How many steps; None for as many as are made in `seconds`.
    seconds
        What the whole may take, the search for a rate included.
    lr
        The highest learning rate; None to find one.
    """

    steps: int | None
    seconds: float | None
    lr: float | None


@dataclass
class Course:
    """How far a training is: what is written down of it beside its tensors."""

    lr: float
    steps: int
    before: float
    best: float
    done: int = 0
    best_step: int = 0
    tried: dict[str, float] = field(default_factory=dict)


def train(
    learning: Mapping[str, nn.Parameter],
    loss: Loss,
    data: Data,
    held: Sequence[Batch],
    asked: Asked,
    shelf: Shelf,
    *,
    workers: Workers = Workers(),
    advance: Callable[[str, int, int], None] = lambda step, done, total: None,
    clock: Callable[[], float] = time.perf_counter,
) -> Course:
    """Train parameters, and leave them at the values that had the least loss on what is held out: perhaps their first.

    A process that takes up what another one saved comes to the same values, bit for bit.

    Parameters
    ----------
    learning
        Name -> parameter.
    loss
        Of the model that has them.
    data, held
        What is trained on, and what is not.
    asked
        How long, and how fast.
    shelf
        Where to keep states.
    workers, advance, clock
        Who shares the work; told about progress; seconds.
    """
    start = clock()
    trainer, best = Trainer(learning, loss, 0.0, workers), values(learning)
    if (found := shelf.load()) is not None:
        state, notes = found
        course = Course(**notes)
        best = {name: state[f"best.{name}"].to(value) for name, value in best.items()}
        trainer.take_up(state, course.done)
    else:
        before = mean_loss(loss, held, workers)
        search = _Search(learning, loss, data, held, before, workers, advance, clock)
        lr = search.best() if asked.lr is None else asked.lr
        steps = asked.steps
        if steps is None:
            each = search.seconds_of_a_step(lr) * (1 + _share(held, data))
            steps = workers.once(lambda: max(1, int(((asked.seconds or 0) - (clock() - start)) / each)))
        tried = {f"{one:g}": value for one, value in search.found.items()}
        course = Course(lr, steps, before, before, tried=tried)
        shelf.save(_state(trainer, best), vars(course))
    trainer.lr = course.lr
    while course.done < course.steps:
        mean = trainer.step(data.of_step(course.done), course.steps)
        course.done = trainer.done
        advance("train", course.done, course.steps)
        ended = course.done == course.steps or not math.isfinite(mean)
        if ended or course.done % EVERY == 0:
            now = mean_loss(loss, held, workers)
            if now < course.best:
                course.best, course.best_step, best = now, course.done, values(learning)
        if ended:
            break
        if course.done % EVERY == 0:
            shelf.save(_state(trainer, best), vars(course))
    put(learning, best)
    return course


def _state(trainer: Trainer, best: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return trainer.state() | {f"best.{name}": value for name, value in best.items()}


def _share(held: Sequence[Batch], data: Data) -> float:
    """What looking at what is held out costs, as a share of the steps between: they run backwards, too."""
    return sum(len(batch.ids) for batch in held) / (data.size * EVERY * 2)


@dataclass
class _Search:
    """Trials of a few steps, after each of which everything is as it was; `found` are the losses after them."""

    learning: Mapping[str, nn.Parameter]
    loss: Loss
    data: Data
    held: Sequence[Batch]
    before: float
    workers: Workers
    advance: Callable[[str, int, int], None]
    clock: Callable[[], float]
    found: dict[float, float] = field(default_factory=dict)
    seconds: float | None = None

    def best(self) -> float:
        """Try rates from neighbour to neighbour as long as the loss on what is held out falls, and pick one."""
        place = FIRST
        way = 1 if self._after(FIRST + 1) < self._after(FIRST) else -1
        while 0 <= place + way < len(RATES) and self._after(place + way) < self._after(place):
            place += way
        return picked(self.found, self.before)

    def seconds_of_a_step(self, lr: float) -> float:
        """Measure how long a step takes, in a trial that is made anyway or in one for that."""
        if self.seconds is None:
            self._try(lr)
        assert self.seconds is not None
        return self.seconds

    def _after(self, place: int) -> float:
        rate = RATES[place]
        if rate not in self.found:
            self.found[rate] = self._try(rate)
            self.advance("probe", len(self.found), max(3, len(self.found)))
        return self.found[rate]

    def _try(self, rate: float) -> float:
        first, trainer, means = values(self.learning), Trainer(self.learning, self.loss, rate, self.workers), []
        start = self.clock()
        for step in range(TRIED_STEPS):
            if step == 1:  # the first one has things to prepare
                start = self.clock()
            means.append(trainer.step(self.data.of_step(step), TRIED_STEPS))
        self.seconds = (self.clock() - start) / (TRIED_STEPS - 1)
        after = mean_loss(self.loss, self.held, self.workers) if math.isfinite(sum(means)) else math.inf
        put(self.learning, first)
        return after if math.isfinite(after) else math.inf


def picked(found: Mapping[float, float], before: float) -> float:
    """Pick a rate by trials shorter than the training: the largest that gains `NEAR` of what the best of them does.

    Parameters
    ----------
    found
        Rate -> loss after the trial.
    before
        Loss before them all.
    """
    best = min(found, key=lambda rate: found[rate])
    enough = NEAR * (before - found[best])
    return max([best, *(rate for rate, after in found.items() if before - after >= enough > 0)])


@torch.no_grad()
def values(learning: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Copy the values of parameters."""
    return {name: parameter.detach().clone() for name, parameter in learning.items()}


@torch.no_grad()
def put(learning: Mapping[str, nn.Parameter], kept: Mapping[str, Tensor]) -> None:
    """Give parameters such values back."""
    for name, parameter in learning.items():
        parameter.copy_(kept[name])
