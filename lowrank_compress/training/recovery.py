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
from lowrank_compress.training.trainer import WARM_UP, Data, Trainer

# Rates, of which neighbours are tried from one on towards the better side; and for how many steps, with a schedule of
# their own.
RATES, FIRST, TRIED_STEPS = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2), 3, 16
# Steps between two looks at what is held out, each of which may become the result.
EVERY = 25
# What is timed where a training is to take so many seconds: steps whose rate does not depend on how many will follow.
TIMED = range(2, WARM_UP - 2)


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
    steps: int | None
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
    trainer, best, course = Trainer(learning, loss, 0.0, workers), _values(learning), None
    if (found := shelf.load()) is not None:
        state, notes = found
        course = Course(**notes)
        best = {name: state[f"best.{name}"].to(value) for name, value in best.items()}
        trainer.take_up(state, course.done)
    else:
        before = mean_loss(loss, held, workers)
        lr, tried = (asked.lr, {}) if asked.lr is not None else _rate(learning, loss, data, held, workers, advance)
        course = Course(lr, asked.steps, before, before, tried={f"{one:g}": value for one, value in tried.items()})
    trainer.lr = course.lr
    times = []
    while course.steps is None or course.done < course.steps:
        times.append(clock())
        # Until it is known how many steps there will be, rates are those of a warm-up, which does not depend on it.
        mean = trainer.step(data.of_step(course.done), course.steps or WARM_UP)
        course.done = trainer.done
        if course.steps is None and course.done == TIMED.stop:
            each = (times[TIMED.stop - 1] - times[TIMED.start]) / (TIMED.stop - 1 - TIMED.start)
            left = int(((asked.seconds or 0) - (clock() - start)) / (each * (1 + _share(held, data))))
            course.steps = int(workers.once(lambda left=left: course.done + max(0, left)))
        if course.steps is not None:
            advance("train", course.done, course.steps)
        ended = course.done == course.steps or not math.isfinite(mean)
        if ended or course.done % EVERY == 0:
            now = mean_loss(loss, held, workers)
            if now < course.best:
                course.best, course.best_step, best = now, course.done, _values(learning)
            if not ended and course.steps is not None:
                state = trainer.state() | {f"best.{name}": value for name, value in best.items()}
                shelf.save(state, vars(course))
        if not math.isfinite(mean):
            break
    _put(learning, best)
    return course


def _share(held: Sequence[Batch], data: Data) -> float:
    """What looking at what is held out costs, as a share of the steps between: a step is three forward passes more."""
    return sum(len(batch.ids) for batch in held) / (data.size * EVERY * 2)


def _rate(
    learning: Mapping[str, nn.Parameter],
    loss: Loss,
    data: Data,
    held: Sequence[Batch],
    workers: Workers,
    advance: Callable[[str, int, int], None],
) -> tuple[float, dict[float, float]]:
    """Find the rate after a few steps of which the loss on what is held out is least; leave everything as it was.

    Returns
    -------
    tuple
        The rate, and the loss after each that was tried.
    """
    first, found = _values(learning), {}

    def tried(place: int) -> float:
        rate = RATES[place]
        if rate not in found:
            trainer = Trainer(learning, loss, rate, workers)
            means = [trainer.step(data.of_step(step), TRIED_STEPS) for step in range(TRIED_STEPS)]
            after = mean_loss(loss, held, workers) if math.isfinite(sum(means)) else math.inf
            found[rate] = after if math.isfinite(after) else math.inf
            _put(learning, first)
            advance("probe", len(found), max(3, len(found)))
        return found[rate]

    place = FIRST
    way = 1 if tried(FIRST + 1) < tried(FIRST) else -1
    while 0 <= place + way < len(RATES) and tried(place + way) < tried(place):
        place += way
    return RATES[place], found


@torch.no_grad()
def _values(learning: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in learning.items()}


@torch.no_grad()
def _put(learning: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    for name, parameter in learning.items():
        parameter.copy_(values[name])
