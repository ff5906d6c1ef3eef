"""Perplexity and accuracy with one block in memory at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from lowrank_compress.errors import NumericsError
from lowrank_compress.model.skeleton import Skeleton
from lowrank_compress.model.walk.batch import Batch
from lowrank_compress.model.walk.head import lm_chunks, token_loss
from lowrank_compress.model.walk.replay import Replay
from lowrank_compress.model.walk.states import State

# Hidden states of this many bytes are carried from block to block at once; longer texts take several passes.
CARRIED_BYTES = 2 << 30


@dataclass(frozen=True)
class Perplexity:
    """Total negative log-likelihood in nats, and over how many tokens.

    Attributes
    ----------
    nats
        Sum over all scored tokens.
    tokens
        Scored tokens: every token of the text exactly once (but the very first where there is no bos).
    """

    nats: float
    tokens: int

    @property
    def value(self) -> float:
        """Perplexity, exp(nats / tokens); infinite where that overflows."""
        mean = self.nats / self.tokens
        return math.exp(mean) if mean < 700 else math.inf


@dataclass(frozen=True)
class Accuracy:
    """How many examples of how many were classified as labelled."""

    right: int
    examples: int

    @property
    def value(self) -> float:
        """Their share."""
        return self.right / self.examples


def perplexity(
    skeleton: Skeleton, batches: Sequence[Batch], advance: Callable[[int, int], None] = lambda done, total: None
) -> Perplexity:
    """Measure perplexity on windows of text.

    Parameters
    ----------
    skeleton
        A causal language model, dense or compressed.
    batches
        Windows, each scoring all its tokens but the first.
    advance
        Called with (blocks done, blocks in all).

    Raises
    ------
    NumericsError
        A logit is NaN or infinite.
    """
    nats, tokens = 0.0, 0
    for part, replay, states in _passes(skeleton, batches, advance):
        for batch, state in zip(part, states, strict=True):
            hidden = replay.load(state)
            for start, stop in lm_chunks(batch):
                with torch.no_grad():
                    logits = replay.head(batch, hidden, start, stop)
                loss = token_loss(logits, batch.ids[:, start + 1 : stop + 1], "the evaluation text")
                nats += loss.double().item()
                tokens += batch.ids.shape[0] * (stop - start)
    return Perplexity(nats, tokens)


def accuracy(
    skeleton: Skeleton, batches: Sequence[Batch], advance: Callable[[int, int], None] = lambda done, total: None
) -> Accuracy:
    """Count the examples whose largest logit is that of their label.

    Raises
    ------
    NumericsError
        A logit is NaN or infinite.
    """
    right, count = 0, 0
    for part, replay, states in _passes(skeleton, batches, advance):
        for batch, state in zip(part, states, strict=True):
            with torch.no_grad():
                logits = replay.head(batch, replay.load(state))
            if not torch.isfinite(logits).all():
                raise NumericsError(
                    "The model gave NaN or infinite logits on the labelled examples. Check the checkpoint."
                )
            assert batch.labels is not None
            right += int((logits.argmax(-1).cpu() == batch.labels).sum())
            count += len(batch.labels)
    return Accuracy(right, count)


def _passes(
    skeleton: Skeleton, batches: Sequence[Batch], advance: Callable[[int, int], None]
) -> Iterator[tuple[Sequence[Batch], Replay, list[State]]]:
    """Run all blocks over groups of batches whose hidden states fit in memory."""
    width = skeleton.model.config.hidden_size
    groups: list[list[Batch]] = [[]]
    carried = 0
    for batch in batches:
        size = batch.ids.numel() * width * 4
        if groups[-1] and carried + size > CARRIED_BYTES:
            groups.append([])
            carried = 0
        groups[-1].append(batch)
        carried += size
    blocks = len(skeleton.resolved.blocks)
    for number, group in enumerate(groups):
        replay = Replay(skeleton, group)
        with torch.no_grad():
            hidden = replay.start()
        base = number * blocks
        hidden = replay.sweep(hidden, lambda block, base=base: advance(base + block + 1, blocks * len(groups)))
        yield group, replay, hidden
