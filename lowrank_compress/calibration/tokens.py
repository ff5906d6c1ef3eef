"""Text to windows of tokens: deterministic, hashed, every token scored exactly once.

Text is tokenised without special tokens. A window is [bos, if the tokenizer adds one] + tokens, `seq_len` in all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lowrank_compress.calibration.sources import Examples
from lowrank_compress.errors import CalibrationError, InputError
from lowrank_compress.model.replay import Batch


def load_tokenizer(path: Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load a checkpoint's tokenizer.

    Raises
    ------
    InputError
        The checkpoint has none.
    """
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as problem:  # transformers raises many types here
        raise InputError(
            f"{path} has no tokenizer that transformers can load ({str(problem).strip().splitlines()[0]}). Put "
            "tokenizer.json and tokenizer_config.json beside the weights."
        ) from problem


def bos_of(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The bos token that the tokenizer puts before a text, if it does."""
    with_special = tokenizer("a", add_special_tokens=True)["input_ids"]
    bos = tokenizer.bos_token_id
    return bos if bos is not None and with_special and with_special[0] == bos else None  # pyright: ignore


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """Token ids of a text, (tokens,) int64, without special tokens."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.long)


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
    windows = ids[: count * body].view(count, body)[order]
    return windows if bos is None else torch.cat([torch.full((len(windows), 1), bos), windows], dim=1)


def evaluation_windows(ids: Tensor, seq_len: int, bos: int | None) -> list[Tensor]:
    """Cut a text so that every token is scored once: windows (length,) int64, at most `seq_len` long.

    With a bos each window is [bos] + tokens and all its tokens are scored. Without one, consecutive windows overlap
    by one token of context, so that all tokens but the very first of the text are scored. In both cases a window
    scores all its positions but the first.
    """
    if bos is not None:
        return [torch.cat([torch.tensor([bos]), part]) for part in ids.split(seq_len - 1)]
    return [ids[start : start + seq_len] for start in range(0, len(ids) - 1, seq_len - 1)]


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


def example_batches(
    tokenizer: PreTrainedTokenizerBase, examples: Examples, label_ids: Mapping[str, int], seq_len: int, size: int
) -> list[Batch]:
    """Tokenise labelled texts as the model expects them (special tokens included), padded within each batch.

    Raises
    ------
    InputError
        A label is not one of the model's classes, or the tokenizer cannot pad.
    """
    if tokenizer.pad_token_id is None:
        raise InputError(
            "The tokenizer has no padding token, which batches of a classifier need. Set `pad_token` in "
            "tokenizer_config.json."
        )
    labels = None if examples.labels is None else [_label(label, label_ids) for label in examples.labels]
    batches = []
    for part in _chunks(range(len(examples.texts)), size):
        encoded = tokenizer(
            [examples.texts[i] for i in part], padding=True, truncation=True, max_length=seq_len, return_tensors="pt"
        )
        mask: Tensor = encoded["attention_mask"]  # pyright: ignore[reportAssignmentType]
        ids: Tensor = encoded["input_ids"]  # pyright: ignore[reportAssignmentType]
        batches.append(Batch(ids, mask, None if labels is None else torch.tensor([labels[i] for i in part])))
    return batches


def _label(label: str, label_ids: Mapping[str, int]) -> int:
    if label in label_ids:
        return label_ids[label]
    numbers = {str(number): number for number in label_ids.values()}
    if label in numbers:
        return numbers[label]
    known = ", ".join(f"{name} ({number})" for name, number in label_ids.items())
    raise InputError(f"The label {label!r} is none of the model's classes: {known}. Check --label-column.")


def _chunks(items: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def batches_hash(batches: Sequence[Batch]) -> str:
    """SHA-256 over all token ids, masks and labels."""
    digest = hashlib.sha256()
    for batch in batches:
        for part in (batch.ids, batch.mask, batch.labels):
            if part is not None:
                digest.update(f"{tuple(part.shape)}".encode())
                digest.update(part.to(torch.int64).contiguous().numpy().tobytes())
    return digest.hexdigest()
