"""Labelled examples of a classifier, in batches of equal lengths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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
    known = _by_class_names(label_ids, examples.class_names)
    labels = None if examples.labels is None else [_label(label, known) for label in examples.labels]
    by_length: dict[int, list[tuple[int, list[int], list[int] | None]]] = {}
    for number, text in enumerate(examples.texts):
        pair = {} if examples.seconds is None else {"text_pair": examples.seconds[number]}
        found = tokenizer(text, **pair, truncation=True, max_length=seq_len, padding=False, verbose=False)
        ids, kinds = found["input_ids"], found.get("token_type_ids") if pair else None
        if not ids:
            raise CalibrationError(
                f"Example {number + 1} has no tokens: its text is {text!r}. Remove it, or fill it in."
            )
        by_length.setdefault(len(ids), []).append((number, ids, kinds))  # pyright: ignore[reportArgumentType]
    batches = []
    for group in by_length.values():
        for start in range(0, len(group), size):
            part = group[start : start + size]
            kinds = None if part[0][2] is None else torch.tensor([kinds for _, _, kinds in part])
            chosen = None if labels is None else torch.tensor([labels[number] for number, _, _ in part])
            ids = torch.tensor([ids for _, ids, _ in part])
            require_known(tokenizer, ids, vocabulary)
            batches.append(Batch(ids, None, chosen, kinds))
    return batches


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
