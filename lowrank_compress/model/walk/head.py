"""The loss at a model's head, with the logits of few positions in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from lowrank_compress.errors import InputError, NumericsError
from lowrank_compress.model.walk.batch import IGNORED, Batch
from lowrank_compress.model.walk.outputs import (
    Meaning,
    drawn_labels,
    meaning_of,
    random_signs,
    summed_loss,
)
from lowrank_compress.model.walk.replay import CHUNKED, Replay

# Logits of this many tokens at a time stand in memory, and no more than so many logits where the vocabulary is large.
HEAD_TOKENS, HEAD_LOGITS = 512, 1 << 24


def tokens_at_once(vocabulary: int) -> int:
    """How many tokens' logits stand in memory at a time."""
    return max(1, min(HEAD_TOKENS, HEAD_LOGITS // vocabulary))


def lm_chunks(batch: Batch, tokens: int = HEAD_TOKENS) -> Iterator[tuple[int, int]]:
    """Ranges of positions whose next token is scored, small enough for the logits of a large vocabulary."""
    if batch.mask is not None:
        raise NumericsError("A padded batch of a language model would have its padding scored; expected whole windows.")
    sequences, length = batch.ids.shape
    width = max(1, tokens // sequences)
    for start in range(0, length - 1, width):
        yield start, min(start + width, length - 1)


def scored_chunks(task: str, batch: Batch, tokens: int) -> Iterator[tuple[int, int | None, Tensor | None]]:
    """Yield ranges of positions with what their logits are scored against, as a head's task says.

    Parameters
    ----------
    tokens
        Of a language model, masked or not: whose logits stand in memory at a time.

    Yields
    ------
    tuple
        Start, stop and labels, `IGNORED` where nothing is scored; None where a batch has none.
    """
    if task == "lm":
        for start, stop in lm_chunks(batch, tokens):
            yield start, stop, batch.ids[:, start + 1 : stop + 1]
    elif task == "masked":
        length, width = batch.ids.shape[1], max(1, tokens // len(batch.ids))
        for start in range(0, length, width):
            labels = None if batch.labels is None else batch.labels[:, start : start + width]
            if labels is None or bool((labels != IGNORED).any()):
                yield start, min(start + width, length), labels
    else:
        yield 0, None, batch.labels


def token_loss(logits: Tensor, targets: Tensor, what: str, meaning: Meaning = "class") -> Tensor:
    """Summed loss, in float32 or better: the cross-entropy in nats of all that are not `IGNORED` (`summed_loss`).

    Raises
    ------
    NumericsError
        A logit is NaN or infinite: it would spoil, or if dropped embellish, the result.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    # A sum is finite only if all terms are, and needs no second matrix; it may overflow where no term does.
    seen = logits.detach()
    if not torch.isfinite(seen.sum()) and not torch.isfinite(seen).all():
        raise NumericsError(
            f"The model gave NaN or infinite logits on {what}. Nothing is dropped from a loss here: check the "
            "checkpoint, or compute in float32 (--dtype concerns only what is written)."
        )
    return summed_loss(meaning, logits, targets)


def head_loss(replay: Replay, batch: Batch, hidden: Tensor, tokens: int | None = None) -> float:
    """Summed loss of a language model in nats, from the hidden states that leave the last block.

    Raises
    ------
    NumericsError
        A logit is not finite.
    """
    nats = 0.0
    for start, stop in lm_chunks(batch, tokens or tokens_at_once(replay.skeleton.vocabulary)):
        with torch.no_grad():
            logits = replay.head(batch, hidden, start, stop)
        nats += token_loss(logits, batch.ids[:, start + 1 : stop + 1], "the calibration set").double().item()
    return nats


def embeddings(replay: Replay, batch: Batch, hidden: Tensor) -> Tensor:
    """Embeddings of the sequences of a batch from the hidden states that leave the last block, (sequences, width).

    Raises
    ------
    NumericsError
        One is not finite.
    """
    found = replay.skeleton.embedding.of(replay.head(batch, hidden), batch.mask)
    if not torch.isfinite(found.detach()).all():
        raise NumericsError("The model gave a NaN or infinite embedding. Check the checkpoint.")
    return found


def output_gradient(replay: Replay, batch: Batch, hidden: Tensor) -> Tensor:
    """Gradient Jᵀv in the hidden states that leave the last block, with J that of outputs e and v random signs.

    Outputs are an embedding, or scores. A small change of a model costs it ½‖Δe‖² of a text, of normalised embeddings
    1 − cosine; of scores, whose squared error is what such models are trained on, that is what it adds to half of it
    where errors and changes have nothing in common. The Hessian of that loss at the dense model is JᵀJ, which is
    E[Jᵀv vᵀJ]: so the second moments of these gradients are its Fisher matrix, and there are no labels in it (the
    generalised Gauss–Newton matrix; Schraudolph, Neural Computation 14, 2002).

    The signs are those of a sequence's number in the calibration set.

    Raises
    ------
    NumericsError
        An output is not finite.
    """
    leaf = hidden.detach().requires_grad_()
    with torch.enable_grad():
        found = embeddings(replay, batch, leaf) if replay.skeleton.task == "embedding" else replay.head(batch, leaf)
    if not torch.isfinite(found.detach()).all():
        raise NumericsError("The model gave NaN or infinite scores on the calibration set. Check the checkpoint.")
    return torch.autograd.grad(found, leaf, random_signs(found.shape, batch.first).to(found))[0]


def head_gradient(
    replay: Replay,
    batch: Batch,
    hidden: Tensor,
    tokens: int | None = None,
    told: Callable[[float], None] = lambda nats: None,
) -> Tensor:
    """Gradient of the summed loss in the hidden states that leave the last block, (sequences, length, width).

    Without a head it is that of the embedding, and of scores theirs (`output_gradient`). Where several labels may apply
    and the batch does not say which do, they are drawn from the model's own predictions. Answers have the sum of the
    losses of first and last token; of a pair it is −log σ(s − s'), with s the score of the preferred one (Bradley and
    Terry, Biometrika 39, 1952), which is the cross-entropy of both scores. The logits of a language model are made for
    so many tokens at a time, by default as memory allows; `told` gets the losses as they are.

    Raises
    ------
    NumericsError
        A logit is not finite.
    InputError
        The head needs labels, and the batch has none.
    """
    task = replay.skeleton.task
    meaning = meaning_of(task, batch)
    if task == "embedding" or meaning == "scores":
        return output_gradient(replay, batch, hidden)
    gradient = torch.zeros_like(hidden)
    for start, stop, labels in scored_chunks(task, batch, tokens or tokens_at_once(replay.skeleton.vocabulary)):
        if labels is None and meaning != "labels":
            raise InputError("The loss of this model's head needs labels, and the data have none.")
        leaf = hidden[:, start:stop].detach().requires_grad_()
        given = Batch(batch.ids[:, start:stop]) if task in CHUNKED else batch
        with torch.enable_grad():
            outputs = replay.head(given, leaf)
            right = drawn_labels(outputs, batch.first) if labels is None else labels
            loss = token_loss(outputs, right, "the calibration set", meaning)
        told(loss.detach().double().item())
        gradient[:, start:stop] = torch.autograd.grad(loss, leaf)[0]
    return gradient
