"""Windows of text some of whose tokens are masked: what a masked language model is to tell, and makes its labels of.

Devlin et al. (NAACL 2019) train on 15 % of the tokens, most of which are masked; here all of these are. What a model
makes of a text is measured on every token once: each window is read several times, each time with another part masked.
(Salazar et al., ACL 2020, mask one token at a time, which takes as many readings as there are tokens.)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lowrank_compress.calibration.tokens import require_known
from lowrank_compress.errors import InputError
from lowrank_compress.model.walk.batch import IGNORED, Batch

# Share of a window's tokens that is masked to calibrate on, and in how many readings all are masked once.
SHARE, READINGS = 0.15, 7


@dataclass(frozen=True)
class Frame:
    """What a tokenizer puts before and behind a text, and the token that stands for a masked one."""

    before: tuple[int, ...]
    after: tuple[int, ...]
    mask: int

    @property
    def length(self) -> int:
        """Tokens that are none of the text."""
        return len(self.before) + len(self.after)


def frame_of(tokenizer: PreTrainedTokenizerBase, vocabulary: int | None = None) -> Frame:
    """Read what stands around a text, and the mask.

    Parameters
    ----------
    vocabulary
        Rows of the model's embedding, of which all these must have one.

    Raises
    ------
    InputError
        There is no mask token, or one is beyond the vocabulary.
    """
    mask = tokenizer.mask_token_id
    if not isinstance(mask, int):
        raise InputError(
            "The model tells masked tokens, and its tokenizer has no mask token; expected mask_token in "
            "tokenizer_config.json. Add the one that the model was trained with."
        )
    bare, whole = (
        list(tokenizer("a", add_special_tokens=special, verbose=False)["input_ids"])  # pyright: ignore
        for special in (False, True)
    )
    places = range(len(whole) - len(bare) + 1)
    start = next((place for place in places if whole[place : place + len(bare)] == bare), 0)
    frame = Frame(tuple(whole[:start]), tuple(whole[start + len(bare) :]), mask)
    require_known(tokenizer, torch.tensor([mask, *frame.before, *frame.after]), vocabulary)
    return frame


def masked_windows(windows: Iterable[Tensor], frame: Frame, size: int, seed: int, skip: int = 0) -> list[Batch]:
    """Mask a share of the tokens of each window, at places that its number and the seed decide.

    Parameters
    ----------
    windows
        Token ids (length,) without what stands around them.
    size
        Windows in a batch.
    skip
        So many windows are left out first.
    """
    rows = []
    for window, order in _orders(windows, seed):
        rows.append(_masked(window, order[: max(1, round(SHARE * len(window)))], frame))
    return _batches(rows[skip:], size)


def read_in_parts(windows: Iterable[Tensor], frame: Frame, size: int, seed: int) -> list[Batch]:
    """Read each window several times, so that each of its tokens is masked once; as `masked_windows`."""
    rows = []
    for window, order in _orders(windows, seed):
        parts = (order[part::READINGS] for part in range(READINGS))
        rows += [_masked(window, part, frame) for part in parts if len(part)]
    return _batches(rows, size)


def readings_of(batches: Iterable[Batch], frame: Frame) -> list[int]:
    """Return of which window each sequence of `read_in_parts` is a reading."""
    found: list[int] = []
    number, left = -1, 0
    for batch in batches:
        for _ in batch.ids:
            if not left:
                number, left = number + 1, min(READINGS, batch.ids.shape[1] - frame.length)
            found.append(number)
            left -= 1
    return found


def _orders(windows: Iterable[Tensor], seed: int) -> Iterable[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    for window in windows:
        yield window, torch.rand(len(window), generator=generator).argsort()


def _masked(window: Tensor, places: Tensor, frame: Frame) -> tuple[Tensor, Tensor]:
    """Token ids as they are read, and labels, each (length,) int64."""
    ids, labels = window.long(), torch.full((len(window),), IGNORED)
    labels[places] = ids[places]
    ids = ids.index_fill(0, places, frame.mask)
    before, after = torch.tensor(frame.before, dtype=torch.int64), torch.tensor(frame.after, dtype=torch.int64)
    around = [torch.full((len(part),), IGNORED) for part in (before, after)]
    return torch.cat([before, ids, after]), torch.cat([around[0], labels, around[1]])


def _batches(rows: Sequence[tuple[Tensor, Tensor]], size: int) -> list[Batch]:
    batches: list[Batch] = []
    pending: list[tuple[Tensor, Tensor]] = []
    for number, row in enumerate(rows, start=1):
        pending.append(row)
        if number == len(rows) or len(pending) == size or len(rows[number][0]) != len(row[0]):
            ids, labels = (torch.stack(part) for part in zip(*pending, strict=True))
            batches.append(Batch(ids, labels=labels))
            pending = []
    return batches
