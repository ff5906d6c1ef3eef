"""Embeddings of texts, and how far those of one model are from those of another, one block in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor

from lowrank_compress.evaluation.replayed import walked
from lowrank_compress.model.skeleton import Skeleton
from lowrank_compress.model.walk.batch import Batch
from lowrank_compress.model.walk.head import embeddings
from lowrank_compress.model.walk.walk import Walk


@torch.no_grad()
def distances_at_the_end(walk: Walk) -> list[float]:
    """Mean of ½‖e − e₀‖² of each further model's embeddings from the first one's, in float64; inf if not finite.

    Parameters
    ----------
    walk
        Of models without a head, gone forwards through all blocks.
    """
    totals, texts = [0.0] * (len(walk.models) - 1), 0
    for number, batch in enumerate(walk.batches):
        found = [
            embeddings(walk.replay(model), batch, walk.leaving(number, model)).double()
            for model in range(len(walk.models))
        ]
        texts += len(batch.ids)
        for model, other in enumerate(found[1:]):
            totals[model] += float((other - found[0]).square().sum() / 2)
    for model in walk.models:
        model.drop_outside()
    return [total / texts if total == total else float("inf") for total in totals]


@torch.no_grad()
def embed(
    skeleton: Skeleton, batches: Sequence[Batch], advance: Callable[[int, int], None] = lambda done, total: None
) -> Tensor:
    """Embed texts, (texts, width) float64, each in the row that the label of its sequence says.

    Raises
    ------
    NumericsError
        An embedding is not finite.
    """
    found: dict[int, Tensor] = {}
    for walk in walked(skeleton, batches, advance):
        for number, batch in enumerate(walk.batches):
            assert batch.labels is not None
            made = embeddings(walk.replay(), batch, walk.leaving(number)).double().cpu()
            found |= dict(zip(batch.labels.tolist(), made, strict=True))
    return torch.stack([found[row] for row in range(len(found))])


def cosines(one: Tensor, other: Tensor) -> Tensor:
    """Cosine of each row of one matrix with the same of the other, (rows,)."""
    return torch.nn.functional.cosine_similarity(one, other, dim=1)


def rank_correlation(one: Sequence[float] | Tensor, other: Sequence[float] | Tensor) -> float:
    """Spearman's ρ, with the mean rank for ties; nan where either is constant."""
    found: Any = spearmanr(torch.as_tensor(one).numpy(), torch.as_tensor(other).numpy())
    return float(found.statistic)
