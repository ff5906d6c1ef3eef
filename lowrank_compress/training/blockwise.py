"""Reconstruction block by block, one block of each model in memory, for models that cannot be trained as a whole.

Each block of the compressed model, on what the compressed blocks before it have made, is trained to give what the dense
block gives on what the dense ones have made: so it makes good for their errors, too (as the blocks of BRECQ, ICLR 2021,
section 3, for quantised weights).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from lowrank_compress.model.skeleton import Skeleton
from lowrank_compress.model.walk.batch import Batch
from lowrank_compress.model.walk.states import StateStore
from lowrank_compress.model.walk.step import Step
from lowrank_compress.model.walk.walk import Walk
from lowrank_compress.resources.workers import Workers
from lowrank_compress.training.loss import mean_loss
from lowrank_compress.training.pairs import Entry
from lowrank_compress.training.recovery import put, values
from lowrank_compress.training.student import Student, Train
from lowrank_compress.training.trainer import Trainer

LR = 3e-3


def reconstruct(
    models: tuple[Skeleton, Skeleton],
    entries: Mapping[str, Entry],
    batches: Sequence[Batch],
    held: Sequence[Batch],
    steps: int,
    *,
    batches_a_step: int,
    lr: float,
    train: Train,
    dtype: torch.dtype,
    found: Callable[[int], Mapping[str, Tensor] | None],
    keep: Callable[[int, Mapping[str, Tensor]], None],
    workers: Workers = Workers(),
    advance: Callable[[str, int, int], None] = lambda step, done, total: None,
) -> None:
    """Train every block in turn; one that is no better on what is held out stays as it is.

    Parameters
    ----------
    models
        The dense one and the compressed one.
    entries
        `quantization_config.modules` of the latter.
    batches, held
        What is trained on, and what is not.
    steps, batches_a_step, lr
        Of each block: steps of Adam, micro-batches in each, and the highest rate.
    train, dtype
        What is trained (`Student`), and in what it will be stored.
    found
        Tensors of a block that an earlier process has finished, by their names in it; None if none has.
    keep
        Told of those of a finished block: none where nothing better was found.
    workers, advance
        All walk all the way; each computes its share of every step.
    """
    both, store = [*batches, *held], StateStore()
    walk = Walk(models, both, store=store)
    for step in walk.forwards():
        path = models[1].resolved.blocks[step.index]
        if (tensors := found(step.index)) is None:
            own = {
                name.removeprefix(f"{path}."): entry for name, entry in entries.items() if name.startswith(f"{path}.")
            }
            tensors = _reconstructed(
                step, own, len(batches), len(both), steps, batches_a_step, lr, train, dtype, store, workers
            )
            keep(step.index, tensors)
        step.blocks[1].load_state_dict(tensors, strict=False)
        step.leave()
        advance("blocks", step.index + 1, walk.blocks)


def _reconstructed(
    step: Step,
    entries: Mapping[str, Entry],
    count: int,
    total: int,
    steps: int,
    width: int,
    lr: float,
    train: Train,
    dtype: torch.dtype,
    store: StateStore,
    workers: Workers,
) -> dict[str, Tensor]:
    """Train a block on the first `count` of `total` batches; return what has changed, in the end."""
    block = step.blocks[1]
    wanted = [store.keep(step.run(number, 0)[1]) for number in range(total)]
    scale = sum(float(each.load().square().mean()) for each in wanted) / total
    as_it_was = {name: tensor.clone() for name, tensor in block.state_dict().items()}

    def loss(number: int) -> tuple[Tensor, int]:
        target = wanted[number].load()
        leaving = step.call(number, step.entering(number, 1), 1)
        return (leaving - target.to(leaving.device)).square().sum() / scale, target.numel()

    held = range(count, total)
    before = mean_loss(loss, held, workers)
    student = Student(block, entries, [""], train)
    trainer, first = Trainer(student.learning, loss, lr, workers), values(student.learning)
    for number in range(steps):
        trainer.step([(number * width + place) % count for place in range(min(width, count))], steps)
    if not mean_loss(loss, held, workers) < before:
        put(student.learning, first)
    found = student.finish(dtype)
    if not mean_loss(loss, held, workers) < before:
        block.load_state_dict(as_it_was)
        found = {}
    block.requires_grad_(False)
    return found
