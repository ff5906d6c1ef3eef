"""How far one model is from another: block by block, in its predictions, and window by window in its loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count

import torch
from torch import Tensor, nn

from lowrank_compress.errors import NumericsError
from lowrank_compress.evaluation.measures import Rows
from lowrank_compress.evaluation.replayed import CARRIED_BYTES, Perplexity, grouped
from lowrank_compress.model.skeleton import Skeleton
from lowrank_compress.model.walk.batch import IGNORED, Batch
from lowrank_compress.model.walk.head import embeddings, scored_chunks
from lowrank_compress.model.walk.outputs import meaning_of, summed_divergence, summed_loss
from lowrank_compress.model.walk.step import Step
from lowrank_compress.model.walk.walk import Walk

Judge = Callable[[int, Tensor], Rows]
"""The number of a batch and the outputs of it -> what these are worth; `exam.Exam.judge` is one."""
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
        How far the second model's outputs are from the first one's, summed (`outputs.summed_divergence`): of classes
        and labels KL(p ‖ p') in nats.
    agreeing, choices
        Choices of a token, a class, or whether a label applies, in which both agree, and all; scores choose nothing.
    losses
        For each model, the loss of the head on each sequence, or pair, summed over its terms.
    terms
        How many terms that is: scored tokens, words, ends of an answer, labels, scores; 1 for an example or a pair.
    rows
        For each model, what its outputs are worth, by batches; empty where there is nobody to judge them.
    embedded
        For each embedding model, the number of a text -> its embedding, (width,) float64; empty for other models.
    """

    embedding: Gap = field(default_factory=Gap)
    blocks: list[BlockGap] = field(default_factory=list)
    divergence: float = 0.0
    agreeing: int = 0
    choices: int = 0
    losses: tuple[list[float], list[float]] = field(default_factory=lambda: ([], []))
    terms: list[int] = field(default_factory=list)
    rows: tuple[list[Rows], list[Rows]] = field(default_factory=lambda: ([], []))
    embedded: tuple[dict[int, Tensor], dict[int, Tensor]] = field(default_factory=lambda: ({}, {}))

    def loss(self, model: int) -> float:
        """Mean loss of one of the two."""
        return sum(self.losses[model]) / sum(self.terms)

    def perplexity(self, model: int) -> float:
        """Perplexity of one of the two."""
        return Perplexity(sum(self.losses[model]), sum(self.terms)).value


def contrast(
    first: Skeleton,
    second: Skeleton,
    batches: Sequence[Batch],
    advance: Callable[[int, int], None] = lambda done, total: None,
    *,
    judge: Judge | None = None,
    carried: int = CARRIED_BYTES,
    head_tokens: int = HEAD_TOKENS,
) -> Contrast:
    """Walk through two models side by side, one block of each in memory.

    Parameters
    ----------
    first, second
        Of one family, with equally many blocks of one width, one vocabulary and one head.
    batches
        Windows of text, or labelled examples; for embedding models texts, labelled by their numbers.
    advance
        Called with (blocks done, blocks in all).
    judge
        Tells what the outputs of a batch are worth, by its number among all.
    carried, head_tokens
        Bytes of hidden states, and tokens with logits, to have in memory at once.

    Raises
    ------
    NumericsError
        A logit is NaN or infinite.
    """
    found = Contrast(blocks=[BlockGap() for _ in first.resolved.blocks])
    groups, places = grouped(first, batches, carried // 2), count()
    for part, group in enumerate(groups):
        # The second model twice: once as it goes its own way, once fed by the first, block by block.
        walk = Walk([first, second, second], group, feeds=(0, 1, 0))
        for step in walk.forwards():
            for number, batch in enumerate(walk.batches):
                _look(found, step, number, batch)
            step.leave()
            advance(part * walk.blocks + step.index + 1, walk.blocks * len(groups))
        for number, batch in enumerate(walk.batches):
            place = next(places)
            if first.task == "embedding":
                _embed(found, walk, number, batch)
            else:
                _judge(found, walk, number, batch, head_tokens, None if judge is None else partial(judge, place))
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


def _judge(
    found: Contrast,
    walk: Walk,
    number: int,
    batch: Batch,
    head_tokens: int,
    judge: Callable[[Tensor], Rows] | None,
) -> None:
    """Add up what two heads say of a batch."""
    task, sequences = walk.models[0].task, len(batch.ids) >> batch.paired
    meaning = meaning_of(task, batch)
    losses, terms = torch.zeros(2, sequences, dtype=torch.float64), torch.zeros(sequences, dtype=torch.int64)
    for start, stop, labels in scored_chunks(task, batch, head_tokens):
        assert labels is not None
        said = _both(walk, number, start, stop, "the text" if judge is None else "the labelled examples")
        if judge is not None:
            for rows, outputs in zip(found.rows, said, strict=True):
                rows.append(judge(outputs.cpu()))
        if meaning == "class":
            terms += _choose(found, losses, said, labels)
            continue
        found.divergence += float(summed_divergence(meaning, *said))
        terms += labels[0].numel()
        for model, outputs in enumerate(said):
            losses[model] += torch.stack(
                [summed_loss(meaning, one[None], wanted[None]) for one, wanted in zip(outputs, labels, strict=True)]
            ).cpu()
        if meaning == "labels":
            found.agreeing += int(((said[0] > 0) == (said[1] > 0)).sum())
            found.choices += labels.numel()
    for model in (0, 1):
        found.losses[model].extend(losses[model].tolist())
    found.terms.extend(terms.tolist())


def _choose(found: Contrast, losses: Tensor, said: Sequence[Tensor], labels: Tensor) -> Tensor:
    """Add up what two heads make of classes (sequences, …, classes); return how many of each sequence are scored."""
    scored, labels = (each.to(said[0].device) for each in (labels != IGNORED, labels))
    one, other = (each.log_softmax(-1) for each in said)
    for model, logs in enumerate((one, other)):
        right = logs.gather(-1, labels.clamp_min(0)[..., None])[..., 0] * scored
        losses[model] -= right.reshape(len(labels), -1).sum(1).cpu()
    found.divergence += float((one.exp() * (one - other)).sum(-1)[scored].sum())
    found.agreeing += int((one.argmax(-1) == other.argmax(-1))[scored].sum())
    found.choices += int(scored.sum())
    return scored.reshape(len(labels), -1).sum(1).cpu()


@torch.no_grad()
def _embed(found: Contrast, walk: Walk, number: int, batch: Batch) -> None:
    """Keep what two embedding models make of texts."""
    assert batch.labels is not None
    for model in (0, 1):
        made = embeddings(walk.replay(model), batch, walk.leaving(number, model)).double().cpu()
        found.embedded[model].update(zip(batch.labels.tolist(), made, strict=True))


@torch.no_grad()
def _both(walk: Walk, number: int, start: int, stop: int | None, what: str) -> list[Tensor]:
    """Outputs of both heads, in float64."""
    found = []
    for model in (0, 1):
        outputs = walk.head(number, walk.leaving(number, model), start, stop, model).double()
        if not torch.isfinite(outputs).all():
            raise NumericsError(
                f"The {('first', 'second')[model]} model gave NaN or infinite logits on {what}. Check the checkpoint."
            )
        found.append(outputs)
    return found
