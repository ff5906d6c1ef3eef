"""How far the predictions of models are from those of another: the Kullback-Leibler divergence, one block in memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lowrank_compress.evaluation.embedded import distances_at_the_end
from lowrank_compress.model.skeleton import Skeleton
from lowrank_compress.model.walk.batch import IGNORED, Batch
from lowrank_compress.model.walk.head import scored_chunks, tokens_at_once
from lowrank_compress.model.walk.outputs import meaning_of, summed_divergence
from lowrank_compress.model.walk.walk import Walk


def divergences(models: Sequence[Skeleton], batches: Sequence[Batch]) -> list[float]:
    """Mean divergence KL(p₀ ‖ p) of each further model's predictions p from the first one's p₀, in nats.

    The mean is over all positions whose next token is known, over examples for a classifier, or over all that has a
    label (masked tokens, words, first and last tokens of answers, pairs); it is summed in
    float64, and infinite where it is not finite, so that a broken model never wins. Of several labels it is the mean
    over examples and labels, of scores half their squared change. Of models without a head it is half the squared
    distance of their embeddings, of normalised ones 1 − cosine.

    Parameters
    ----------
    models
        Of equally many blocks, one block of each in memory at a time; the first is what the others are held against.
    batches
        Windows of text, or examples for a classifier.

    Returns
    -------
    list of float
        One less than there are models.
    """
    walk = Walk(models, batches)
    for _ in walk.forwards():
        pass
    return divergences_at_the_end(walk)


def divergences_at_the_end(walk: Walk) -> list[float]:
    """Return the same of the models of a walk that has gone forwards through all blocks."""
    if walk.models[0].task == "embedding":
        return distances_at_the_end(walk)
    totals, terms = [0.0] * (len(walk.models) - 1), 0
    first = walk.models[0]
    for number, batch in enumerate(walk.batches):
        if (meaning := meaning_of(first.task, batch)) != "class":
            wanted = _outputs(walk, number, 0, 0, None)
            terms += wanted.numel()
            for model in range(1, len(walk.models)):
                got = _outputs(walk, number, model, 0, None)
                totals[model - 1] += float(summed_divergence(meaning, wanted.double(), got.double()))
            continue
        for start, stop, labels in scored_chunks(first.task, batch, tokens_at_once(first.vocabulary)):
            scored = None if labels is None or batch.labels is None else labels != IGNORED
            expected = _log_probabilities(walk, number, 0, start, stop, scored)
            probabilities = expected.exp()
            terms += expected[..., 0].numel()
            for model in range(1, len(walk.models)):
                got = _log_probabilities(walk, number, model, start, stop, scored)
                each = torch.sub(expected, got, out=got).mul_(probabilities).sum(-1)
                totals[model - 1] += float(each.double().sum())
    for model in walk.models:
        model.drop_outside()
    return [total / terms if total == total else float("inf") for total in totals]


@torch.no_grad()
def _outputs(walk: Walk, number: int, model: int, start: int, stop: int | None) -> Tensor:
    return walk.head(number, walk.leaving(number, model), start, stop, model)


@torch.no_grad()
def _log_probabilities(
    walk: Walk, number: int, model: int, start: int, stop: int | None, scored: Tensor | None
) -> Tensor:
    """Log-probabilities in single precision at least: which model is nearer shows in fewer digits."""
    logits = _outputs(walk, number, model, start, stop)
    logits = logits if scored is None else logits[scored.to(logits.device)]
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
