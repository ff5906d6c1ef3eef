"""What token classifiers, question answering and reward heads learn from: words with labels, answers, preferences.

Each is read from the rows of a table into examples of its kind, and these become batches whose labels are what the
head's own loss is against.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from lowrank_compress.calibration.cells import Cell
from lowrank_compress.calibration.examples import Row, class_numbers, equally_long
from lowrank_compress.calibration.sources import Source, open_table
from lowrank_compress.calibration.tokens import renderer, require_known, vocabulary_of
from lowrank_compress.errors import CalibrationError, InputError
from lowrank_compress.model.checkpoint import Checkpoint
from lowrank_compress.model.tasks import Task
from lowrank_compress.model.walk.batch import IGNORED, Batch, pair_rows

# What the columns of a preference are called, the last part of a path with dots.
CHOSEN, REJECTED = "chosen", "rejected"


class Words(NamedTuple):
    """Words and the label of each."""

    words: list[str]
    labels: list[str]


class Question(NamedTuple):
    """A question, the text that answers it, and from which character to which (None where it does not); all answers."""

    question: str
    context: str
    answer: tuple[int, int] | None
    answers: tuple[str, ...] = ()


class Preference(NamedTuple):
    """A text that is preferred to another."""

    chosen: str
    rejected: str


@dataclass(frozen=True)
class Labelled:
    """Examples of one kind.

    Attributes
    ----------
    examples
        In the order of the rows.
    class_names
        Of `Words`: names of the classes that are numbered, where the data set says them.
    """

    examples: list[Any]
    class_names: Sequence[str] | None = None


def has_labels(task: Task, source: Source) -> bool:
    """Whether a source is named with the columns that a head's own loss needs."""
    if task in ("tokens", "answers"):
        return source.label_column is not None
    return task == "scores" and prefers(source)


def prefers(source: Source) -> bool:
    """Whether the columns that a source names are those of preferences."""
    columns = (source.text_column or "").split(",")
    return [column.rpartition(".")[2] for column in columns] == [CHOSEN, REJECTED]


def needs(task: Task) -> str:
    """Say how to pass what a head's own loss is against, for messages."""
    return {
        "tokens": "a table with the words in --text-column and a label for each in --label-column",
        "answers": "a table with --text-column question --text-column context, and the answer in --label-column",
        "scores": f"a table with --text-column {CHOSEN} --text-column {REJECTED}, or one with a column of texts in "
        "--text-column and of numbers in --label-column",
        "labels": "a table with --text-column, and the labels that apply in --label-column",
    }.get(task, "a table with --text-column and --label-column")


def read_labelled(task: Task, source: Source, tokenizer: PreTrainedTokenizerBase, limit: int | None = None) -> Labelled:
    """Read the examples of a head's kind.

    Raises
    ------
    CalibrationError, InputError
        It is no table, lacks a column, has no rows, or a row has something else in one.
    """
    if not source.is_table:
        raise InputError(f"{source.name} is no table; this model's head learns from {needs(task)}.")
    columns = (source.text_column or "text").split(",")
    if len(columns) != (1 if task == "tokens" else 2):
        raise InputError(f"--text-column names {', '.join(columns)}; this model's head learns from {needs(task)}.")
    rows, known = open_table(source)
    read: Mapping[Task, Callable[[list[Cell], Cell | None], Any]] = {
        "tokens": _words,
        "answers": _question,
        "scores": lambda cells, _: Preference(*(cell.rendered(renderer(tokenizer)) for cell in cells)),
    }
    found = []
    for place, row in islice(rows, limit):
        cells = [Cell.find(row, column, place, source.name) for column in columns]
        label = None if task == "scores" else Cell.find(row, source.label_column or "", place, source.name)
        found.append(read[task](cells, label))
    if not found:
        raise CalibrationError(f"{source.name} has no rows. Pass a file with examples in it.")
    feature = known.get(source.label_column)
    return Labelled(found, getattr(getattr(feature, "feature", feature), "names", None))


def _words(cells: list[Cell], label: Cell | None) -> Words:
    assert label is not None
    words, labels = cells[0].words(), label.labels()
    if len(words) != len(labels):
        raise CalibrationError(
            f"{label.place} of {label.source} has {len(words)} words and {len(labels)} labels; expected one for each "
            "word. Repair or remove the row."
        )
    return Words(words, labels)


def _question(cells: list[Cell], label: Cell | None) -> Question:
    assert label is not None
    context = cells[1].text()
    return Question(cells[0].text(), context, label.answer(context), label.answers())


def labelled_batches(
    task: Task,
    labelled: Labelled,
    numbers: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    checkpoint: Checkpoint,
    seq_len: int,
    size: int,
) -> list[Batch]:
    """Make batches of some of the examples.

    Of `Words` the first token of each has its label, and no other one; of a `Question` the labels are where the answer
    begins and ends, the first token where there is none within `seq_len`. A `Preference` is two sequences
    (`batch.pair_rows`).

    Parameters
    ----------
    numbers
        Of the examples.
    seq_len
        Tokens of a sequence at most; texts are cut there.
    size
        Sequences in a batch.

    Raises
    ------
    InputError
        A label is none of the model's classes, an id is beyond its vocabulary, or the tokenizer does not say where its
        tokens are.
    CalibrationError
        A question leaves no room for its text, or an example has no token.
    """
    if task != "scores" and not tokenizer.is_fast:
        raise slow_tokenizer()
    if task == "scores":
        require_one_score(checkpoint)
    examples = [labelled.examples[number] for number in numbers]
    vocabulary = vocabulary_of(checkpoint)
    if task == "scores":
        return _preferences(examples, tokenizer, int(checkpoint.config.pad_token_id), seq_len, size, vocabulary)
    if task == "tokens":
        number_of = class_numbers(checkpoint.class_ids, labelled.class_names)
        rows = [_tagged(each, number_of, tokenizer, seq_len) for each in examples]
    else:
        rows = [_spanned(each, tokenizer, seq_len) for each in examples]
    for row in rows:
        require_known(tokenizer, torch.tensor(row.ids), vocabulary)
    return equally_long(rows, size)


def _tagged(example: Words, number_of: Callable[[str], int], tokenizer: PreTrainedTokenizerBase, seq_len: int) -> Row:
    starts = list(accumulate((len(word) + 1 for word in example.words), initial=0))
    found: Any = tokenizer(
        " ".join(example.words), truncation=True, max_length=seq_len, return_offsets_mapping=True, verbose=False
    )
    labels, word = [IGNORED] * len(found["input_ids"]), 0
    for position, (start, end) in enumerate(found["offset_mapping"]):
        while start < end and word < len(example.words) and end > starts[word]:
            if labels[position] == IGNORED:
                labels[position] = number_of(example.labels[word])
            word += 1
    if word == 0:
        raise CalibrationError(
            f"An example has no tokens: its words are {example.words[:5]}. Remove it, or fill it in."
        )
    return Row(found["input_ids"], None, labels)


def _spanned(example: Question, tokenizer: PreTrainedTokenizerBase, seq_len: int) -> Row:
    try:
        found: Any = tokenizer(
            example.question,
            example.context,
            truncation="only_second",
            max_length=seq_len,
            return_offsets_mapping=True,
            verbose=False,
        )
    except Exception as problem:  # the tokenizer's own types
        raise no_room(example, seq_len) from problem
    ids = found["input_ids"]
    places = places_of(found["offset_mapping"], found.sequence_ids())
    return Row(ids, found.get("token_type_ids"), span_of(example, places, first_place(ids, tokenizer)))


def places_of(offsets: Sequence[tuple[int, int]], sides: Sequence[int | None]) -> list[tuple[int, int] | None]:
    """Return for each token of a question and its text from which character of the text to which it is, or None."""
    return [(start, stop) if side == 1 else None for (start, stop), side in zip(offsets, sides, strict=True)]


def span_of(example: Question, places: Sequence[tuple[int, int] | None], first: int) -> list[int]:
    """Return the places of the first and the last token of the answer; `first` twice if its end is not in there."""
    if example.answer is None:
        return [first, first]
    begin, end = example.answer
    found = [(number, place[1]) for number, place in enumerate(places) if place and place[0] < end and place[1] > begin]
    return [found[0][0], found[-1][0]] if found and found[-1][1] >= end else [first, first]


def require_one_score(checkpoint: Checkpoint) -> None:
    """Refuse preferences of models that do not give one score of a text.

    Raises
    ------
    InputError
        So it is.
    """
    if (scores := checkpoint.config.num_labels) != 1:
        raise InputError(
            f"Preferences are for models with one score, and this one has {scores}. Name another column of text."
        )


def slow_tokenizer() -> InputError:
    """Make the error of a tokenizer that does not say where its tokens are."""
    return InputError(
        "The tokenizer does not say where in a text its tokens are, as labels of words and answers need it; expected a "
        "fast one (tokenizer.json)."
    )


def first_place(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the place of the token that stands for no answer: the classifier's, or the first."""
    return ids.index(tokenizer.cls_token_id) if tokenizer.cls_token_id in ids else 0  # pyright: ignore[reportArgumentType]


def no_room(example: Question, seq_len: int) -> CalibrationError:
    """Make the error of a question that leaves no room for its text."""
    return CalibrationError(
        f"The question {example.question[:60]!r} leaves no room for its text in --seq-len {seq_len}. Use a larger one."
    )


def _preferences(
    examples: Sequence[Preference],
    tokenizer: PreTrainedTokenizerBase,
    padding: int,
    seq_len: int,
    size: int,
    vocabulary: int | None,
) -> list[Batch]:
    batches = []
    each = max(1, size // 4 * 2)  # an even number, where there is room
    for begin in range(0, len(examples), each):
        part = examples[begin : begin + each]
        rows: list[list[int]] = [[] for _ in range(2 * len(part))]
        for (one, other), example in zip(pair_rows(len(part)).tolist(), part, strict=True):
            for row, text in ((one, example.chosen), (other, example.rejected)):
                rows[row] = tokenizer(text, truncation=True, max_length=seq_len, verbose=False)["input_ids"]  # pyright: ignore
                if not rows[row]:
                    raise CalibrationError(f"A text has no tokens: {text!r}. Remove its row, or fill it in.")
        longest = max(map(len, rows))
        ids = torch.tensor([row + [padding] * (longest - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        require_known(tokenizer, ids, vocabulary)
        labels = torch.zeros(len(part), dtype=torch.int64)
        batches.append(Batch(ids, None if bool(mask.all()) else mask, labels, paired=True))
    return batches
