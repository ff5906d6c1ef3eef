"""Steps of AdamW on batches that follow from their number alone, over one process or several, to be taken up anywhere.

A plain loop, and not transformers' Trainer: what a step does is in one place and depends on its number and seed alone,
a state is a few tensors in a file that this package hashes and verifies like any other, and several processes need one
sum of gradients; Trainer's checkpoints are pickles, in a layout of its own that changes with its version.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_compress.model.walk.batch import Batch
from lowrank_compress.resources.workers import Workers
from lowrank_compress.training.loss import Loss

WARM_UP, FLOOR = 10, 0.05
BETAS, CLIP = (0.9, 0.95), 1.0


def rate(lr: float, step: int, steps: int) -> float:
    """Learning rate of a step (from 0): linear over the first `WARM_UP`, then a half cosine down to `FLOOR` of `lr`.

    Of a few steps no more than a quarter is for warming up.
    """
    warm_up = max(1, min(WARM_UP, steps // 4))
    if step < warm_up:
        return lr * (step + 1) / warm_up
    way = (step - warm_up) / max(1, steps - warm_up)
    return lr * (FLOOR + (1 - FLOOR) * (1 + math.cos(math.pi * min(1.0, way))) / 2)


@dataclass(frozen=True)
class Data:
    """What steps are made on: examples or windows, one a `Batch`, gone through in another seeded order each time.

    Attributes
    ----------
    items
        One sequence each.
    size
        Sequences a step.
    micro
        Sequences computed at once.
    seed
        Of the orders.
    padding
        Token that fills up what is shorter than others in a micro-batch; None where nothing is padded, and only
        sequences of one length are computed at once.
    """

    items: Sequence[Batch]
    size: int
    micro: int
    seed: int
    padding: int | None = None

    def of_step(self, step: int) -> list[Batch]:
        """Return the micro-batches of a step: a function of its number."""
        first, count = step * self.size, len(self.items)
        picked = []
        for epoch in range(first // count, (first + self.size - 1) // count + 1):
            order = torch.randperm(count, generator=torch.Generator().manual_seed(self.seed + epoch)).tolist()
            start = epoch * count
            picked += order[max(0, first - start) : max(0, first + self.size - start)]
        return self.together([self.items[number] for number in picked])

    def together(self, items: Sequence[Batch]) -> list[Batch]:
        """Make micro-batches of sequences: `micro` in each, or as many more as are so much shorter than the longest."""
        if self.padding is None:
            return joined(items, self.micro)
        return padded(items, self.micro * max(item.ids.shape[1] for item in self.items), self.padding)


def joined(items: Sequence[Batch], size: int) -> list[Batch]:
    """Put sequences of one length together, `size` at most in a batch; a pair stays by itself."""
    by_length: dict[int, list[Batch]] = {}
    pairs = [item for item in items if item.paired]
    for item in items:
        if not item.paired:
            by_length.setdefault(item.ids.shape[1], []).append(item)
    return pairs + [
        _one(group[start : start + size]) for group in by_length.values() for start in range(0, len(group), size)
    ]


def padded(items: Sequence[Batch], tokens: int, padding: int) -> list[Batch]:
    """Put sequences of like lengths together, filled up on the right: `tokens` at most in a batch, with its padding."""
    groups: list[list[Batch]] = []
    for item in sorted(items, key=lambda item: item.ids.shape[1]):
        if not groups or (len(groups[-1]) + 1) * item.ids.shape[1] > tokens:
            groups.append([])
        groups[-1].append(item)
    return [_one([_filled(item, group[-1].ids.shape[1], padding) for item in group]) for group in groups]


def _filled(item: Batch, length: int, padding: int) -> Batch:
    """Fill a sequence up; with its mask, even where nothing is to be filled."""
    missing = (0, length - item.ids.shape[1])
    kinds = None if item.kinds is None else nn.functional.pad(item.kinds, missing)
    mask = nn.functional.pad(torch.ones_like(item.ids), missing)
    return Batch(nn.functional.pad(item.ids, missing, value=padding), mask, item.labels, kinds)


def _one(items: Sequence[Batch]) -> Batch:
    parts = zip(*((item.ids, item.mask, item.labels, item.kinds) for item in items), strict=True)
    ids, mask, labels, kinds = (None if part[0] is None else torch.cat(part) for part in parts)
    assert ids is not None
    return Batch(ids, mask, labels, kinds, outputs=items[0].outputs)


class Trainer:
    """Trains parameters, one step at a time.

    Parameters
    ----------
    learning
        Name -> parameter.
    loss
        Of the model that has them.
    lr
        The highest learning rate.
    workers
        Each takes its share of a step's micro-batches; all have the same parameters before and after.
    """

    def __init__(
        self, learning: Mapping[str, nn.Parameter], loss: Loss, lr: float, workers: Workers = Workers()
    ) -> None:
        self.learning, self.loss, self.lr, self.workers = dict(learning), loss, lr, workers
        parameters = list(self.learning.values())
        self.optimizer = torch.optim.AdamW(parameters, lr, BETAS, weight_decay=0.0)
        self.done = 0

    def step(self, batches: Sequence[Any], steps: int) -> float:
        """Make a step of `steps` in all; return the mean loss before it, in nats a prediction."""
        parameters = list(self.learning.values())
        total = 0.0
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        count = 0
        for batch in self.workers.share(batches):
            summed, predictions = self.loss(batch)
            summed.backward()
            total += float(summed.detach())
            count += predictions
        total, count = self.workers.total([total, count])
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        self.workers.add(gradients)
        for gradient in gradients:
            gradient /= count
        if math.isfinite(total):
            nn.utils.clip_grad_norm_(parameters, CLIP)
            for group in self.optimizer.param_groups:
                group["lr"] = rate(self.lr, self.done, steps)
            self.optimizer.step()
        self.done += 1
        return total / count

    def state(self) -> dict[str, Tensor]:
        """Return everything that the next steps depend on but their number: tensors by name."""
        found = {f"value.{name}": parameter.detach() for name, parameter in self.learning.items()}
        for name, parameter in self.learning.items():
            for moment in ("exp_avg", "exp_avg_sq"):
                if moment in self.optimizer.state[parameter]:
                    found[f"{moment}.{name}"] = self.optimizer.state[parameter][moment]
        return found

    @torch.no_grad()
    def take_up(self, state: Mapping[str, Tensor], done: int) -> None:
        """Go on from a state that was returned after `done` steps."""
        self.done = done
        for name, parameter in self.learning.items():
            parameter.copy_(state[f"value.{name}"])
            if done:
                self.optimizer.state[parameter] = {
                    "step": torch.tensor(float(done)),
                    **{key: state[f"{key}.{name}"].to(parameter.device) for key in ("exp_avg", "exp_avg_sq")},
                }
