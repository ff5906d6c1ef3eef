"""Perplexity, and walks to the end of a model, with one block in memory at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from lowrank_compress.model.skeleton import Skeleton
from lowrank_compress.model.walk.batch import Batch
from lowrank_compress.model.walk.head import HEAD_TOKENS, scored_chunks, token_loss
from lowrank_compress.model.walk.walk import Walk

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


def perplexity(
    skeleton: Skeleton,
    batches: Sequence[Batch],
    advance: Callable[[int, int], None] = lambda done, total: None,
    *,
    carried: int = CARRIED_BYTES,
    head_tokens: int = HEAD_TOKENS,
) -> Perplexity:
    """Measure perplexity on windows of text; of a masked language model that of its masked tokens.

    Parameters
    ----------
    skeleton
        A language model, dense or compressed.
    batches
        Windows, each scoring all its tokens but the first; or with labels at masked ones.
    advance
        Called with (blocks done, blocks in all).
    carried, head_tokens
        Bytes of hidden states, and tokens with logits, to have in memory at once.

    Raises
    ------
    NumericsError
        A logit is NaN or infinite.
    """
    nats, tokens = 0.0, 0
    for walk in walked(skeleton, batches, advance, carried):
        for number, batch in enumerate(walk.batches):
            hidden = walk.leaving(number)
            for start, stop, labels in scored_chunks(skeleton.task, batch, head_tokens):
                assert labels is not None
                with torch.no_grad():
                    logits = walk.head(number, hidden, start, stop)
                nats += token_loss(logits, labels, "the evaluation text").double().item()
            tokens += batch.terms
    return Perplexity(nats, tokens)


def walked(
    skeleton: Skeleton,
    batches: Sequence[Batch],
    advance: Callable[[int, int], None] = lambda done, total: None,
    carried: int = CARRIED_BYTES,
) -> Iterator[Walk]:
    """Yield walks at the end of their way, one for each group of batches whose hidden states have no more bytes."""
    groups = grouped(skeleton, batches, carried)
    for number, group in enumerate(groups):
        walk = Walk([skeleton], group)
        for step in walk.forwards():
            step.leave()
            advance(number * walk.blocks + step.index + 1, walk.blocks * len(groups))
        yield walk


def grouped(skeleton: Skeleton, batches: Sequence[Batch], carried: int) -> list[list[Batch]]:
    """Part batches into groups whose hidden states have no more than so many bytes, or which are one batch."""
    width = skeleton.model.config.hidden_size
    groups: list[list[Batch]] = [[]]
    bytes_of_group = 0
    for batch in batches:
        size = batch.ids.numel() * width * 4
        if groups[-1] and bytes_of_group + size > carried:
            groups.append([])
            bytes_of_group = 0
        groups[-1].append(batch)
        bytes_of_group += size
    return groups
