"""Questions with their texts, in as many overlapping parts as a model has room for."""

from __future__ import annotations

from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from lowrank_compress.calibration.examples import Row
from lowrank_compress.calibration.labelled import Question, first_place, no_room

# Tokens that two parts of a text have in common at most.
OVERLAP = 128


class Window(NamedTuple):
    """A question and a part of its text.

    Attributes
    ----------
    row
        The sequence; without labels.
    places
        For each token from which character of the text to which it is; None where it is not of it.
    first
        Place of the token that stands for no answer.
    """

    row: Row
    places: list[tuple[int, int] | None]
    first: int


def windows_of(example: Question, tokenizer: PreTrainedTokenizerBase, seq_len: int) -> list[Window]:
    """Read a question with each part of its text.

    Raises
    ------
    CalibrationError
        The question leaves no room for its text.
    """
    bare: Any = tokenizer(example.question, "", verbose=False)
    room = seq_len - len(bare["input_ids"])
    if room < 1:
        raise no_room(example, seq_len)
    found: Any = tokenizer(
        example.question,
        example.context,
        truncation="only_second",
        max_length=seq_len,
        stride=min(OVERLAP, room // 2),
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        verbose=False,
    )
    windows = []
    for number, ids in enumerate(found["input_ids"]):
        sides = found.sequence_ids(number)
        offsets = found["offset_mapping"][number]
        places = [tuple(place) if side == 1 else None for place, side in zip(offsets, sides, strict=True)]
        kinds = found["token_type_ids"][number] if "token_type_ids" in found else None
        if any(places):
            windows.append(Window(Row(ids, kinds, None), places, first_place(ids, tokenizer)))
    if not windows:
        raise no_room(example, seq_len)
    return windows
