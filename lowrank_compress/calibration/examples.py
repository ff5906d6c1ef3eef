"""Labelled examples of a classifier, in batches of equal lengths."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from lowrank_compress.calibration.sources import Examples
from lowrank_compress.calibration.tokens import require_known
from lowrank_compress.errors import CalibrationError, InputError
from lowrank_compress.model.walk.batch import Batch


def example_batches(
    tokenizer: PreTrainedTokenizerBase,
    examples: Examples,
    label_ids: Mapping[str, int],
    seq_len: int,
    size: int,
    vocabulary: int | None = None,
) -> list[Batch]:
    """Tokenise labelled texts as the model expects them, special tokens included.

    Examples of one length make a batch, in their order: nothing is padded, so that no result depends on the company
    that an example is in, on which side the tokenizer pads, or on what the model takes for padding.

    Raises
    ------
    InputError
        A label is not one of the model's classes, or a token id is beyond the `vocabulary`.
    CalibrationError
        An example has no tokens.
    """
    number_of = class_numbers(label_ids, examples.class_names)
    labels = None if examples.labels is None else [number_of(label) for label in examples.labels]
    return text_batches(tokenizer, examples, labels, seq_len, size, vocabulary)


def text_batches(
    tokenizer: PreTrainedTokenizerBase,
    examples: Examples,
    labels: Sequence[Any] | None,
    seq_len: int,
    size: int,
    vocabulary: int | None = None,
) -> list[Batch]:
    """Make such batches with labels as models have them: the number of a class, or a list of numbers, for each text."""
    rows = []
    for number, text in enumerate(examples.texts):
        pair = {} if examples.seconds is None else {"text_pair": examples.seconds[number]}
        found = tokenizer(text, **pair, truncation=True, max_length=seq_len, padding=False, verbose=False)
        ids, kinds = found["input_ids"], found.get("token_type_ids") if pair else None
        if not ids:
            raise CalibrationError(
                f"Example {number + 1} has no tokens: its text is {text!r}. Remove it, or fill it in."
            )
        require_known(tokenizer, torch.tensor(ids), vocabulary)
        rows.append(Row(ids, kinds, None if labels is None else labels[number]))  # pyright: ignore[reportArgumentType]
    return equally_long(rows, size)


class Row(NamedTuple):
    """A sequence: its token ids, which sentence of a pair each is of, and its label, or labels."""

    ids: list[int]
    kinds: list[int] | None
    labels: int | list[int] | list[float] | None


def equally_long(rows: Sequence[Row], size: int) -> list[Batch]:
    """Make batches of `size` sequences of one length at most, in the order in which each length comes first."""
    return [_batch([rows[number] for number in part]) for part in grouped(rows, size)]


def grouped(rows: Sequence[Row], size: int) -> list[list[int]]:
    """Return the numbers of the sequences of each of these batches."""
    by_length: dict[int, list[int]] = {}
    for number, row in enumerate(rows):
        by_length.setdefault(len(row.ids), []).append(number)
    return [group[start : start + size] for group in by_length.values() for start in range(0, len(group), size)]


def _batch(rows: Sequence[Row]) -> Batch:
    ids, kinds, labels = (None if part[0] is None else torch.tensor(part) for part in zip(*rows, strict=True))
    assert ids is not None
    if labels is not None and labels.is_floating_point():
        labels = torch.tensor([row.labels for row in rows], dtype=torch.float64)
    return Batch(ids, None, labels, kinds)


def class_numbers(label_ids: Mapping[str, int], names: Sequence[str] | None) -> Callable[[str], int]:
    """Return what tells the number of a class from its label, the model's name or number of it.

    Parameters
    ----------
    label_ids
        The model's labels.
    names
        Names of the classes that are numbered, where the data set says them.

    Raises
    ------
    InputError
        Some of the names are the model's, but not all; and then, a label is none of the model's classes.
    """
    known = _by_class_names(label_ids, names)
    return lambda label: _label(label, known)


def _by_class_names(label_ids: Mapping[str, int], names: Sequence[str] | None) -> Mapping[str, int]:
    """Let a data set's numbers of classes mean the model's classes of the same names, where the names are the same."""
    model = {label.casefold(): number for label, number in label_ids.items()}
    same = [name.casefold() in model for name in names or ()]
    if not any(same):
        return label_ids
    if names is None or not all(same):
        raise InputError(
            f"The data set's classes are {', '.join(names or ())}, and the model's {', '.join(label_ids)}: some names "
            "are the same, but not all. Use a table with the model's names as labels."
        )
    return {**label_ids, **{str(number): model[name.casefold()] for number, name in enumerate(names)}}


def _label(label: str, label_ids: Mapping[str, int]) -> int:
    if label in label_ids:
        return label_ids[label]
    numbers = {str(number): number for number in label_ids.values()}
    if label in numbers:
        return numbers[label]
    known = ", ".join(f"{name} ({number})" for name, number in label_ids.items())
    raise InputError(f"The label {label!r} is none of the model's classes: {known}. Check --label-column.")
