"""The loss at a model's head, with the logits of few positions in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lowrank_compress.errors import NumericsError
from lowrank_compress.model.walk.batch import Batch

HEAD_TOKENS = 512  # logits of this many tokens at a time stand in memory


def lm_chunks(batch: Batch) -> Iterator[tuple[int, int]]:
    """Ranges of positions whose next token is scored, small enough for the logits of a large vocabulary."""
    if batch.mask is not None:
        raise NumericsError("A padded batch of a language model would have its padding scored; expected whole windows.")
    sequences, length = batch.ids.shape
    width = max(1, HEAD_TOKENS // sequences)
    for start in range(0, length - 1, width):
        yield start, min(start + width, length - 1)


def token_loss(logits: Tensor, targets: Tensor, what: str) -> Tensor:
    """Summed cross-entropy in nats, in float32 or better.

    Raises
    ------
    NumericsError
        A logit is NaN or infinite: it would spoil, or if dropped embellish, the result.
    """
    logits = logits.flatten(0, -2)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if not torch.isfinite(logits.detach()).all():
        raise NumericsError(
            f"The model gave NaN or infinite logits on {what}. Nothing is dropped from a loss here: check the "
            "checkpoint, or compute in float32 (--dtype concerns only what is written)."
        )
    return nn.functional.cross_entropy(logits, targets.flatten().to(logits.device), reduction="sum")
