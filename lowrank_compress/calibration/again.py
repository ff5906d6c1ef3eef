"""Statistics of the dense model and, in the same walk, of what a plan makes of it: the Fisher matrix where it matters.

The Fisher matrix F of the dense model tells what the first bit of an error costs. At a result that has lost much it is
another one: F₁ = E[g gᵀ], with g the gradients of the compressed model's cross-entropy against labels that are drawn
from the dense model's predictions, so that it is the divergence between the two whose gradients they are on average.
(F + F₁)/2 stands for all of the way between them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowrank_compress.arch.targets import Target
from lowrank_compress.calibration.hooks import hooked
from lowrank_compress.calibration.moments import Moments
from lowrank_compress.calibration.statistics import STATISTICS, first_half, statistic_key
from lowrank_compress.model.skeleton import Skeleton
from lowrank_compress.model.walk.batch import IGNORED, Batch
from lowrank_compress.model.walk.head import head_gradient, scored_chunks, tokens_at_once
from lowrank_compress.model.walk.outputs import drawn_labels
from lowrank_compress.model.walk.step import Step
from lowrank_compress.model.walk.walk import Walk, gradient_of_loss


@dataclass(frozen=True)
class Again:
    """A second look at what is lost, at a model that has lost something.

    Attributes
    ----------
    edited
        The dense model with other matrices.
    narrowed
        Names of the targets that have lost some of their outputs altogether: these have no gradient, and what is known
        of the others is how much larger it has become.
    seed
        Of the labels that are drawn.
    """

    edited: Skeleton
    narrowed: frozenset[str] = frozenset()
    seed: int = 0

    def gradient(self, walk: Walk, number: int, model: int) -> Tensor:
        """Gradient of the loss: the dense model's own, and the edited one's against labels drawn from the dense one."""
        if model == 0:
            return gradient_of_loss(walk, number, model)
        return head_gradient(walk.replay(model), self.labelled(walk, number), walk.leaving(number, model))

    @torch.no_grad()
    def labelled(self, walk: Walk, number: int) -> Batch:
        """Return a batch whose next tokens, classes or labels are drawn from the dense model's predictions."""
        batch, hidden = walk.batches[number], walk.leaving(number)
        task = walk.models[0].task
        if task == "labels":
            return replace(batch, labels=drawn_labels(walk.head(number, hidden), self.seed + batch.first))
        if batch.outputs:  # of the loss of an embedding, or of scores, there are no labels
            return batch
        generator = torch.Generator().manual_seed((self.seed + batch.first) % 2**63)

        def drawn(logits: Tensor) -> Tensor:
            shares = logits.detach().float().softmax(-1).cpu()
            return torch.multinomial(shares.flatten(0, -2), 1, generator=generator).reshape(shares.shape[:-1])

        ids, labels = batch.ids.clone(), None if batch.labels is None else batch.labels.clone()
        for start, stop, right in scored_chunks(task, batch, tokens_at_once(walk.models[0].vocabulary)):
            found = drawn(walk.head(number, hidden, start, stop)).to(ids)
            if labels is None or right is None:
                ids[:, start + 1 : None if stop is None else stop + 1] = found
            else:
                part = labels if right.shape == labels.shape else labels[:, start:stop]
                part[right != IGNORED] = found[right != IGNORED]
        return replace(batch, ids=ids, labels=labels)

    def measure(self, walk: Walk, step: Step, moments: Moments, clip: float | None) -> None:
        """Add to `moments` what the edited model's gradients are in a block; δ is taken with the dense weights."""
        for number, batch in enumerate(walk.batches):
            with hooked(self.edited, step.index, moments, batch, clip, weighed_by=walk.models[0]):
                step.run(number, 1)

    def combined(
        self, targets: tuple[Target, ...], dense: Mapping[str, Tensor], edited: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return (F + F₁)/2 of each statistic of gradients, and the dense model's of the others.

        Of a target that is narrowed, F₁ is taken for F · Σ diag F₁ / Σ diag F, both sums over the outputs it still has.
        """
        found = dict(dense)
        for target in targets:
            for name in (name for name, statistic in STATISTICS.items() if statistic.gradient):
                key = statistic_key(target, name)
                for each in (key, first_half(key)):
                    if each in edited:
                        growth = _growth(target, name, dense, edited) if target.name in self.narrowed else None
                        other = edited[each] if growth is None else dense[each] * growth
                        found[each] = (dense[each] + other) / 2
        return found


@dataclass(frozen=True)
class Growth(Again):
    """A second look of which only the scales of gradients are asked: ``out_square`` is the one statistic it serves."""

    def combined(
        self, targets: tuple[Target, ...], dense: Mapping[str, Tensor], edited: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return (2,) for each target: Σ diag F and Σ diag F₁ over the outputs it still has."""
        found = {}
        for target in targets:
            key = statistic_key(target, "out_square")
            if key in edited:
                there = edited[key] > 0
                found[target.name] = torch.stack([means[key][there].sum() for means in (dense, edited)])
        return found


def _growth(target: Target, name: str, dense: Mapping[str, Tensor], edited: Mapping[str, Tensor]) -> float:
    """How much larger the gradients of the outputs are that there still are."""
    key = statistic_key(target, "out_square" if name == "in_fisher" else name)
    before, after = (_diagonal(means[key]) for means in (dense, edited))
    there = after > 0
    return float(after[there].sum() / before[there].sum()) if bool((before[there] > 0).any()) else 1.0


def _diagonal(moment: Tensor) -> Tensor:
    return moment if moment.ndim == 1 else moment.diagonal(dim1=-2, dim2=-1)
