"""How far one model is from another: block by block, in its predictions, and window by window in its loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lowrank_compress.errors import NumericsError
from lowrank_compress.evaluation.replayed import CARRIED_BYTES, Perplexity, grouped
from lowrank_compress.model.skeleton import Skeleton
from lowrank_compress.model.walk.batch import Batch
from lowrank_compress.model.walk.head import embeddings, lm_chunks
from lowrank_compress.model.walk.step import Step
from lowrank_compress.model.walk.walk import Walk

# Logits of so many tokens of each model stand in memory, in float64.
HEAD_TOKENS = 128


@dataclass
class Gap:
    """Sums over tokens of how far the second model's hidden states h' are from the first one's h.

    Attributes
    ----------
    squares, of
        Σ‖h' − h‖² and Σ‖h‖².
    cosines, tokens
        Σ cos(h', h), and the number of terms.
    """

    squares: float = 0.0
    of: float = 0.0
    cosines: float = 0.0
    tokens: int = 0

    def add(self, first: Tensor, second: Tensor, real: Tensor | None) -> None:
        """Add the hidden states (sequences, length, width) of a batch; `real` says which positions count."""
        one, other = (states.flatten(0, 1) for states in (first, second))
        if real is not None:
            one, other = one[real.to(one.device)], other[real.to(one.device)]
        wide, gap = one.double(), other.double() - one.double()
        self.squares += float(gap.square().sum())
        self.of += float(wide.square().sum())
        self.cosines += float(nn.functional.cosine_similarity(wide, other.double(), dim=-1).sum())
        self.tokens += len(one)

    @property
    def relative(self) -> float:
        """√(Σ‖h' − h‖² / Σ‖h‖²)."""
        return math.sqrt(self.squares / self.of) if self.of else (math.inf if self.squares else 0.0)

    @property
    def cosine(self) -> float:
        """Mean cosine of h' and h over tokens."""
        return self.cosines / self.tokens


@dataclass
class BlockGap:
    """What a block adds to the distance of two models.

    Attributes
    ----------
    error
        What leaves the blocks, each model having come by its own way.
    own
        The same where the second model's block is given what enters the first one's: its own fault alone.
    """

    error: Gap = field(default_factory=Gap)
    own: Gap = field(default_factory=Gap)


@dataclass
class Contrast:
    """What two models make of the same batches.

    Attributes
    ----------
    embedding
        What enters the first block.
    blocks
        What leaves each block.
    divergence
        Sum over positions of KL(p ‖ p') in nats, the first model's predictions against the second's.
    agreeing, positions
        Positions at which both have the same most probable token (or class), and all.
    nats
        For each model, the negative log-likelihood of each window in nats (of each example, for a classifier).
    tokens
        Of each window: how many are scored.
    right
        For each classifier, whether it is right about each example; empty for language models.
    embedded
        For each embedding model, the number of a text -> its embedding, (width,) float64; empty for other models.
    """

    embedding: Gap = field(default_factory=Gap)
    blocks: list[BlockGap] = field(default_factory=list)
    divergence: float = 0.0
    agreeing: int = 0
    positions: int = 0
    nats: tuple[list[float], list[float]] = field(default_factory=lambda: ([], []))
    tokens: list[int] = field(default_factory=list)
    right: tuple[list[bool], list[bool]] = field(default_factory=lambda: ([], []))
    embedded: tuple[dict[int, Tensor], dict[int, Tensor]] = field(default_factory=lambda: ({}, {}))

    def perplexity(self, model: int) -> float:
        """Perplexity of one of the two."""
        return Perplexity(sum(self.nats[model]), sum(self.tokens)).value


def contrast(
    first: Skeleton,
    second: Skeleton,
    batches: Sequence[Batch],
    advance: Callable[[int, int], None] = lambda done, total: None,
    *,
    carried: int = CARRIED_BYTES,
    head_tokens: int = HEAD_TOKENS,
) -> Contrast:
    """Walk through two models side by side, one block of each in memory.

    Parameters
    ----------
    first, second
        Of one family, with equally many blocks of one width, and one vocabulary.
    batches
        Windows of text, or labelled examples for classifiers; for embedding models texts, labelled by their numbers.
    advance
        Called with (blocks done, blocks in all).
    carried, head_tokens
        Bytes of hidden states, and tokens with logits, to have in memory at once.

    Raises
    ------
    NumericsError
        A logit is NaN or infinite.
    """
    found = Contrast(blocks=[BlockGap() for _ in first.resolved.blocks])
    groups = grouped(first, batches, carried // 2)
    for part, group in enumerate(groups):
        # The second model twice: once as it goes its own way, once fed by the first, block by block.
        walk = Walk([first, second, second], group, feeds=(0, 1, 0))
        for step in walk.forwards():
            for number, batch in enumerate(walk.batches):
                _look(found, step, number, batch)
            step.leave()
            advance(part * walk.blocks + step.index + 1, walk.blocks * len(groups))
        for number, batch in enumerate(walk.batches):
            if first.task == "embedding":
                _embed(found, walk, number, batch)
            elif batch.labels is None:
                _predict(found, walk, number, batch, head_tokens)
            else:
                _classify(found, walk, number, batch, batch.labels)
        for model in {first, second}:
            model.drop_outside()
    return found


@torch.no_grad()
def _look(found: Contrast, step: Step, number: int, batch: Batch) -> None:
    """Put a batch through a block of both models, and add up how far they are apart."""
    real = batch.real()
    entering, leaving = step.run(number, 0)
    entered, left = step.run(number, 1)
    if step.index == 0:
        found.embedding.add(entering, entered, real)
    found.blocks[step.index].error.add(leaving, left, real)
    found.blocks[step.index].own.add(leaving, step.call(number, entering, 2), real)


def _predict(found: Contrast, walk: Walk, number: int, batch: Batch, head_tokens: int) -> None:
    """Add up what two language models say of the tokens of a batch."""
    sequences = len(batch.ids)
    nats = torch.zeros(2, sequences, dtype=torch.float64)
    for start, stop in lm_chunks(batch, head_tokens):
        one, other = _both(walk, number, start, stop, "the text")
        targets = batch.ids[:, start + 1 : stop + 1, None]
        _add(found, one, other)
        for model, said in enumerate((one, other)):
            nats[model] -= said.gather(2, targets.to(said.device)).sum((1, 2)).cpu()
    for model in (0, 1):
        found.nats[model].extend(nats[model].tolist())
    found.tokens.extend([batch.ids.shape[1] - 1] * sequences)


def _classify(found: Contrast, walk: Walk, number: int, batch: Batch, labels: Tensor) -> None:
    """Add up what two classifiers say of the examples of a batch."""
    one, other = _both(walk, number, 0, None, "the labelled examples")
    _add(found, one, other)
    for model, said in enumerate((one.cpu(), other.cpu())):
        found.nats[model].extend((-said.gather(1, labels[:, None])[:, 0]).tolist())
        found.right[model].extend((said.argmax(-1) == labels).tolist())
    found.tokens.extend([1] * len(labels))


@torch.no_grad()
def _embed(found: Contrast, walk: Walk, number: int, batch: Batch) -> None:
    """Keep what two embedding models make of texts."""
    assert batch.labels is not None
    for model in (0, 1):
        made = embeddings(walk.replay(model), batch, walk.leaving(number, model)).double().cpu()
        found.embedded[model].update(zip(batch.labels.tolist(), made, strict=True))


@torch.no_grad()
def _both(walk: Walk, number: int, start: int, stop: int | None, what: str) -> list[Tensor]:
    """Log-probabilities of both models, in float64."""
    found = []
    for model in (0, 1):
        logits = walk.head(number, walk.leaving(number, model), start, stop, model).double()
        if not torch.isfinite(logits).all():
            raise NumericsError(
                f"The {('first', 'second')[model]} model gave NaN or infinite logits on {what}. Check the checkpoint."
            )
        found.append(logits.log_softmax(-1))
    return found


def _add(found: Contrast, one: Tensor, other: Tensor) -> None:
    """Add up how far two sets of log-probabilities (…, vocabulary) are from each other."""
    found.divergence += float((one.exp() * (one - other)).sum())
    found.agreeing += int((one.argmax(-1) == other.argmax(-1)).sum())
    found.positions += one[..., 0].numel()
