"""Texts with numbers, or with any number of labels each: what regressions and classifiers of several labels are for.

Gradients are of outputs and need no labels (`model.walk.outputs`); measuring, and training on a table, do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerBase

from lowrank_compress.calibration.cells import Cell
from lowrank_compress.calibration.examples import class_numbers, text_batches
from lowrank_compress.calibration.labelled import prefers, require_one_score
from lowrank_compress.calibration.sources import Examples, Source, read_examples
from lowrank_compress.calibration.tables import Row
from lowrank_compress.calibration.tokens import vocabulary_of
from lowrank_compress.errors import CalibrationError, InputError
from lowrank_compress.model.checkpoint import Checkpoint
from lowrank_compress.model.tasks import Task
from lowrank_compress.model.walk.batch import Batch


def read_marked(task: Task, source: Source, checkpoint: Checkpoint, limit: int | None = None) -> Examples:
    """Read texts and, where columns of labels are named, what each output should be: a number, or 1 or 0.

    A regression has its numbers in one column, as a number or a list of them, or in as many columns as it has scores,
    in their order. Of several labels those that apply are in one column, as a list or a text with semicolons of their
    names or numbers, or as a list of as many true and false, 1.0 and 0.0; or each has a column of 1 and 0, of its name.

    Raises
    ------
    CalibrationError, InputError
        As `read_examples`; or a row has something else, too few or too many, or names a label that the model has not.
    """
    if prefers(source):
        require_one_score(checkpoint)
    read = partial(_numbers if task == "scores" else _marks, source, checkpoint)
    return read_examples(source, limit, read)


def marked_batches(
    examples: Examples, tokenizer: PreTrainedTokenizerBase, checkpoint: Checkpoint, seq_len: int, size: int
) -> list[Batch]:
    """Make batches of such texts, of `size` of one length; their labels are (sequences, outputs) float64.

    Raises
    ------
    InputError, CalibrationError
        A token id is beyond the vocabulary, or a text has no tokens.
    """
    found = text_batches(tokenizer, examples, examples.labels, seq_len, size, vocabulary_of(checkpoint))
    return [replace(batch, outputs=_outputs(checkpoint)) for batch in found]


def _outputs(checkpoint: Checkpoint) -> int:
    return len(checkpoint.config.id2label or {})


def _cells(source: Source, row: Row) -> list[Cell]:
    assert source.label_column is not None
    place, values = row
    alone = source.label_column in values
    columns = [source.label_column] if alone else source.label_column.split(",")
    return [Cell.find(values, column, place, source.name) for column in columns]


def _numbers(source: Source, checkpoint: Checkpoint, row: Row, names: Sequence[str] | None) -> list[float]:
    cells, scores = _cells(source, row), _outputs(checkpoint)
    found = cells[0].numbers() if len(cells) == 1 else [cell.number() for cell in cells]
    if len(found) != scores:
        raise CalibrationError(
            f"{row[0]} of {source.name} has {_count(len(found), 'number')} in {source.label_column}, and the model "
            f"gives {_count(scores, 'score')}; expected as many. Check --label-column."
        )
    return found


def _marks(source: Source, checkpoint: Checkpoint, row: Row, names: Sequence[str] | None) -> list[float]:
    cells, classes = _cells(source, row), _outputs(checkpoint)
    if len(cells) > 1:
        places = _places(cells, checkpoint.class_ids, classes)
        flags = {place: cell.flag() for place, cell in zip(places, cells, strict=True)}
        return [float(flags[place]) for place in range(classes)]
    found = cells[0].marks()
    if found and isinstance(found[0], bool):
        if len(found) != classes:
            raise CalibrationError(
                f"{row[0]} of {source.name} has a list of {len(found)} in {source.label_column}, each true or false, "
                f"and the model has {_count(classes, 'label')}; expected as many."
            )
        return [float(flag) for flag in found]
    number_of = class_numbers(checkpoint.class_ids, names)
    numbers = [number_of(str(label)) for label in found]
    if len(set(numbers)) < len(numbers):
        raise CalibrationError(
            f"{row[0]} of {source.name} names a label twice in {source.label_column}: {cells[0].value!r}. Name those "
            "that apply, or write 1.0 and 0.0, or true and false, for each label."
        )
    return [float(place in numbers) for place in range(classes)]


def _places(cells: Sequence[Cell], class_ids: Mapping[str, int], classes: int) -> list[int]:
    """Tell which label each column is of: by its name, or by its place where the model's labels have no names."""
    columns = [cell.column for cell in cells]
    known: dict[str, Any] = {label.casefold(): number for label, number in class_ids.items()}
    if set(known) == {f"label_{number}" for number in range(classes)} and not set(map(str.casefold, columns)) & set(
        known
    ):
        known = {column.casefold(): number for number, column in enumerate(columns)}
    places = [known.get(column.casefold()) for column in columns]
    if sorted(place for place in places if place is not None) != list(range(classes)) or None in places:
        labels = ", ".join(sorted(class_ids, key=class_ids.__getitem__))
        raise InputError(
            f"--label-column names the columns {', '.join(columns)}, and the model's labels are {labels}; expected one "
            "column for each label, of its name."
        )
    return [place for place in places if place is not None]


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
