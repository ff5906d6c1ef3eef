"""What training makes small: the divergence from a teacher, or the loss of the user's own text and labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_compress.model.embedding import Embedding
from lowrank_compress.model.tasks import Task
from lowrank_compress.model.walk.batch import IGNORED, Batch, pair_rows
from lowrank_compress.model.walk.outputs import Meaning, meaning_of, summed_divergence, summed_loss
from lowrank_compress.resources.workers import Workers

Loss = Callable[[Any], tuple[Tensor, int]]
"""A batch, or whatever stands for one -> the summed loss, in nats of predictions, and over how many of them."""


def scored_outputs(model: nn.Module, batch: Batch, task: Task = "lm") -> Tensor:
    """Return the outputs of all that is scored, (predictions, classes) or (sequences, outputs), in float32 or better.

    Of a language model they are those of every position that a token follows; of a masked one those of masked tokens;
    of a classifier one for each example. Of words they are those of tokens with labels, or where a batch has none of
    all; of answers those of first and last tokens, over all positions; of pairs both scores, of others all.
    """
    device = next(model.parameters()).device
    config: Any = model.config
    kinds = batch.kinds if getattr(config, "type_vocab_size", 0) > 1 else None
    more = {"attention_mask": batch.mask, "token_type_ids": kinds}
    given = {name: part.to(device) for name, part in more.items() if part is not None}
    found = model(input_ids=batch.ids.to(device), **given)
    if task == "answers":
        logits = torch.stack([found.start_logits, found.end_logits], 1).flatten(0, 1)
    elif task == "lm":
        logits = found.logits[:, :-1].flatten(0, 1)
    elif task in ("tokens", "masked"):
        real = batch.real() if batch.labels is None else _scored(batch.labels)
        logits = found.logits.flatten(0, 1)
        logits = logits if real is None else logits[real.to(device)]
    else:
        logits = found.logits[pair_rows(len(batch.ids) // 2), 0] if batch.paired else found.logits
    return logits if logits.dtype == torch.float64 else logits.float()


def _scored(labels: Tensor) -> Tensor:
    return (labels != IGNORED).flatten()


def _count(meaning: Meaning, outputs: Tensor) -> int:
    return len(outputs) if meaning == "class" else outputs.numel()


def from_teacher(student: nn.Module, teacher: nn.Module, task: Task = "lm") -> Loss:
    """Make the loss of a student that is to predict what a teacher predicts (Hinton et al., 2015, temperature 1).

    It is `summed_divergence` of the outputs, for which no labels are needed: of scores half their squared distance, of
    pairs of texts, too.
    """

    def loss(batch: Batch) -> tuple[Tensor, int]:
        batch = replace(batch, paired=False)
        meaning = meaning_of(task, batch)
        with torch.no_grad():
            wanted = scored_outputs(teacher, batch, task)
        found = scored_outputs(student, batch, task)
        return summed_divergence(meaning, wanted, found), _count(meaning, found)

    return loss


def from_embedding(student: nn.Module, teacher: nn.Module, embedding: Embedding) -> Loss:
    """Make the loss of a student without a head: half the squared distance of its embedding from the teacher's."""

    def embedded(model: nn.Module, batch: Batch) -> Tensor:
        device = next(model.parameters()).device
        mask = {} if batch.mask is None else {"attention_mask": batch.mask.to(device)}
        return embedding.of(model(input_ids=batch.ids.to(device), **mask).last_hidden_state, batch.mask)

    def loss(batch: Batch) -> tuple[Tensor, int]:
        with torch.no_grad():
            wanted = embedded(teacher, batch)
        found = embedded(student, batch)
        return (found - wanted.to(found)).square().sum() / 2, len(found)

    return loss


def from_text(student: nn.Module, task: Task = "lm") -> Loss:
    """Make the loss of a model that is to predict the next token of a text, or the labels of examples."""

    def loss(batch: Batch) -> tuple[Tensor, int]:
        meaning = meaning_of(task, batch)
        found = scored_outputs(student, batch, task)
        right = batch.ids[:, 1:] if batch.labels is None else batch.labels
        if task in ("tokens", "masked"):
            right = right.flatten()[_scored(right)]
        right = right.flatten() if meaning == "class" else right
        return summed_loss(meaning, found, right), _count(meaning, found)

    return loss


@torch.no_grad()
def mean_loss(loss: Loss, batches: Sequence[Any], workers: Workers = Workers()) -> float:
    """Measure a mean loss over batches; each of several workers takes its share of them."""
    total, count = 0.0, 0
    for batch in workers.share(batches):
        summed, predictions = loss(batch)
        total += float(summed.double())
        count += predictions
    total, count = workers.total([total, count])
    return total / count
