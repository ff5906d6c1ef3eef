"""What training makes small: the divergence from a teacher, or the cross-entropy of the user's own text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_compress.model.embedding import Embedding
from lowrank_compress.model.walk.batch import Batch
from lowrank_compress.resources.workers import Workers

Loss = Callable[[Any], tuple[Tensor, int]]
"""A batch, or whatever stands for one -> the summed loss, in nats of predictions, and over how many of them."""


def scored_logits(model: nn.Module, batch: Batch) -> Tensor:
    """Return logits of all that is scored, (predictions, classes or vocabulary), in float32 or better.

    Of a language model they are those of every position that a token follows; of a classifier one for each example.
    """
    device = next(model.parameters()).device
    config: Any = model.config
    kinds = batch.kinds if getattr(config, "type_vocab_size", 0) > 1 else None
    more = {"attention_mask": batch.mask, "token_type_ids": kinds}
    given = {name: part.to(device) for name, part in more.items() if part is not None}
    logits = model(input_ids=batch.ids.to(device), **given).logits
    logits = logits[:, :-1].flatten(0, 1) if logits.ndim == 3 else logits
    return logits if logits.dtype == torch.float64 else logits.float()


def divergence(wanted: Tensor, found: Tensor) -> Tensor:
    """Sum KL(teacher ‖ student) over predictions: Σ p (log p − log q), from logits (predictions, classes) of both."""
    return nn.functional.kl_div(
        found.log_softmax(-1), wanted.to(found.device).log_softmax(-1), reduction="sum", log_target=True
    )


def from_teacher(student: nn.Module, teacher: nn.Module) -> Loss:
    """Make the loss of a student that is to predict what a teacher predicts (Hinton et al., 2015, temperature 1)."""

    def loss(batch: Batch) -> tuple[Tensor, int]:
        with torch.no_grad():
            wanted = scored_logits(teacher, batch)
        found = scored_logits(student, batch)
        return divergence(wanted, found), len(found)

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


def from_text(student: nn.Module) -> Loss:
    """Make the loss of a model that is to predict the next token of a text, or the label of an example."""

    def loss(batch: Batch) -> tuple[Tensor, int]:
        found = scored_logits(student, batch)
        right = batch.ids[:, 1:].flatten() if batch.labels is None else batch.labels
        return nn.functional.cross_entropy(found, right.to(found.device), reduction="sum"), len(found)

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
