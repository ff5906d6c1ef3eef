"""Windows of tokens: every token scored exactly once.

A window is [bos, if the tokenizer adds one] + tokens, `seq_len` in all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from lowrank_compress.errors import CalibrationError
from lowrank_compress.model.walk.batch import Batch


def calibration_windows(ids: Tensor, seq_len: int, samples: int, seed: int, bos: int | None) -> Tensor:
    """Cut a calibration set: the first `samples` full windows after a seeded shuffle, (windows, seq_len) int64.

    A text with fewer full windows gives all it has.

    Raises
    ------
    CalibrationError
        The text is shorter than one window.
    """
    body = seq_len - (bos is not None)
    count = len(ids) // body
    if count == 0:
        raise CalibrationError(
            f"The calibration text has {len(ids)} tokens; one window of --seq-len {seq_len} needs {body}. Pass more "
            "text or a smaller --seq-len."
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:samples]
    windows = ids[: count * body].view(count, body)[order].long()
    return windows if bos is None else torch.cat([torch.full((len(windows), 1), bos), windows], dim=1)


def evaluation_windows(ids: Tensor, seq_len: int, bos: int | None) -> list[Tensor]:
    """Cut a text so that every token is scored once: windows (length,) int64, at most `seq_len` long.

    With a bos each window is [bos] + tokens and all its tokens are scored. Without one, consecutive windows overlap
    by one token of context, so that all tokens but the very first of the text are scored. In both cases a window
    scores all its positions but the first.
    """
    if bos is not None:
        return [torch.cat([torch.tensor([bos]), part.long()]) for part in ids.split(seq_len - 1)]
    return [ids[start : start + seq_len].long() for start in range(0, len(ids) - 1, seq_len - 1)]


def window_batches(windows: Sequence[Tensor], size: int) -> list[Batch]:
    """Group windows of equal length into batches of at most `size`, in order."""
    batches: list[Batch] = []
    pending: list[Tensor] = []
    for window in windows:
        if pending and (len(pending) == size or len(window) != len(pending[0])):
            batches.append(Batch(torch.stack(pending)))
            pending = []
        pending.append(window)
    return [*batches, Batch(torch.stack(pending))] if pending else batches


def drawn_windows(batches: Sequence[Batch], vocabulary: int, each: int) -> list[Batch]:
    """Make windows of random tokens, one for every so many windows of text; each begins as all of those do.

    Moments of text alone say nothing of inputs that are not in it. These add what the model makes of any: so what is
    fitted to few windows of one domain does not ruin the others, and is better in its own.

    Parameters
    ----------
    batches
        Windows of text, of one length.
    vocabulary
        Tokens to draw from, all equally likely.
    each
        So many windows of text for one of these; 0 for none.
    """
    ids = torch.cat([batch.ids for batch in batches])
    count = len(ids) // each if each else 0
    drawn = torch.randint(vocabulary, (count, ids.shape[1]), generator=torch.Generator().manual_seed(count))
    if bool((ids[:, 0] == ids[0, 0]).all()):
        drawn[:, 0] = ids[0, 0]
    return window_batches(list(drawn), len(batches[0].ids))


def batches_hash(batches: Sequence[Batch]) -> str:
    """SHA-256 over all token ids, masks and labels."""
    digest = hashlib.sha256()
    for batch in batches:
        for part in (batch.ids, batch.mask, batch.labels, batch.kinds):
            if part is not None:
                digest.update(f"{tuple(part.shape)}".encode())
                exact = part if part.is_floating_point() else part.to(torch.int64)
                digest.update(exact.contiguous().numpy().tobytes())
    return digest.hexdigest()
