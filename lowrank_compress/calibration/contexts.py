"""Questions with their texts, in as many overlapping parts as a model has room for."""

from __future__ import annotations

from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from lowrank_compress.calibration.examples import Row
from lowrank_compress.calibration.labelled import Question, first_place, no_room, places_of, span_of

# Tokens that two parts of a text have in common at most.
OVERLAP = 128


class Window(NamedTuple):
    """A question and a part of its text.

    Attributes
    ----------
    row
        The sequence. Its labels are where the answer begins and ends; the token that stands for none, where it is not
        all in there, as models are trained.
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
        places = places_of(found["offset_mapping"][number], found.sequence_ids(number))
        kinds = found["token_type_ids"][number] if "token_type_ids" in found else None
        if there := [place for place in places if place]:
            first = first_place(ids, tokenizer)
            begun = bool(windows) and example.answer is not None and example.answer[0] < there[0][0]
            span = [first, first] if begun else span_of(example, places, first)
            windows.append(Window(Row(ids, kinds, span), places, first))
    if not windows:
        raise no_room(example, seq_len)
    return windows
