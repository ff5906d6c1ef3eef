"""Perplexity, and walks to the end of a model, with one block in memory at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from lowrank_compress.model.skeleton import Skeleton
from lowrank_compress.model.walk.batch import IGNORED, Batch
from lowrank_compress.model.walk.head import HEAD_TOKENS, scored_chunks, token_loss
from lowrank_compress.model.walk.walk import Walk

# Hidden states of this many bytes are carried from block to block at once; longer texts take several passes.
CARRIED_BYTES = 2 << 30
# Positions that are told of together by position: those below, and then twice as many each.
FIRST_POSITIONS = 32


@dataclass(frozen=True)
class Perplexity:
    """Total negative log-likelihood in nats, and over how many tokens.

    Attributes
    ----------
    nats
        Sum over all scored tokens.
    tokens
        Scored tokens: every token of the text exactly once (but the very first where there is no bos).
    parts
        The same of the tokens between bounds, where there are any; of some there may be no tokens.
    """

    nats: float
    tokens: int
    parts: tuple[Perplexity, ...] = ()

    @property
    def value(self) -> float:
        """Perplexity, exp(nats / tokens); infinite where that overflows."""
        mean = self.nats / self.tokens
        return math.exp(mean) if mean < 700 else math.inf


def position_bounds(seq_len: int) -> list[int]:
    """Bounds of positions to measure apart: 0, 32, 64, 128, … up to the length of a window, the last part shorter."""
    bounds = [0]
    while bounds[-1] < seq_len:
        bounds.append(min(2 * bounds[-1] or FIRST_POSITIONS, seq_len))
    return bounds


def perplexity(
    skeleton: Skeleton,
    batches: Sequence[Batch],
    advance: Callable[[int, int], None] = lambda done, total: None,
    *,
    bounds: Sequence[int] = (),
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
    bounds
        Ascending positions in a window, from 0: the tokens between each two of them are told of apart, too.
    carried, head_tokens
        Bytes of hidden states, and tokens with logits, to have in memory at once.

    Raises
    ------
    NumericsError
        A logit is NaN or infinite.
    """
    nats, tokens = 0.0, 0
    sums, counts = [0.0] * (len(bounds) - 1), [0] * (len(bounds) - 1)
    for walk in walked(skeleton, batches, advance, carried):
        for number, batch in enumerate(walk.batches):
            hidden = walk.leaving(number)
            for start, stop, labels in scored_chunks(skeleton.task, batch, head_tokens):
                assert labels is not None
                with torch.no_grad():
                    logits = walk.head(number, hidden, start, stop)
                nats += token_loss(logits, labels, "the evaluation text").double().item()
                position = start + 1 if skeleton.task == "lm" else start  # of the first that is scored
                for part, (first, end) in enumerate(pairwise(bounds)):
                    among = slice(max(first - position, 0), max(end - position, 0))
                    if (scored := labels[:, among]).numel():
                        sums[part] += token_loss(logits[:, among], scored, "the evaluation text").double().item()
                        counts[part] += int((scored != IGNORED).sum())
            tokens += batch.terms
    return Perplexity(nats, tokens, tuple(map(Perplexity, sums, counts)))


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
