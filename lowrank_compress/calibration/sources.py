"""Where calibration and evaluation text comes from: files, tables and data sets of the hub.

Nothing is guessed: a value that is no text, a file that is not what its name says and a row that lacks a column are
errors that name row and column. Files are read a piece at a time, so that memory does not follow their size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch

from lowrank_compress.calibration.cells import Cell, Render
from lowrank_compress.calibration.hub import hub_rows, load_hub
from lowrank_compress.calibration.tables import TABLES, Row, shown
from lowrank_compress.calibration.textfiles import COMPRESSED, read_pieces
from lowrank_compress.errors import CalibrationError, InputError
from lowrank_compress.texts import SELF

PAPERS_DATA = "hf:Salesforce/wikitext:wikitext-2-raw-v1:train"
# Columns that are taken where none is named.
USUAL = ("text", "messages", "conversations")
# Characters of text that are taken from the hub; nobody means more for a calibration set.
HUB_TEXT = 1 << 28


@dataclass(frozen=True)
class Source:
    """Where text comes from.

    Attributes
    ----------
    name
        A text file; a table (.jsonl, .json, .csv, .tsv, .parquet); either also compressed (.gz, .bz2, .xz, .zst); or a
        data set of the hub, ``hf:NAME[:CONFIG[:SPLIT]]``, where the split may be a slice, ``train[:1000]``; or
        ``self``, what the dense model writes by itself (`calibration.own`), which is not read here.
    text_column
        Column of a table that holds the text or the conversation; dots lead into nested values. None for the usual one,
        `text`, `messages` or `conversations`. Two columns, with a comma between them, are a pair of sentences for a
        classifier.
    label_column
        Column of the labels, for a classifier; several with commas between them, one for each label or score.
    """

    name: str
    text_column: str | None = None
    label_column: str | None = None

    @property
    def is_hub(self) -> bool:
        """Whether the source is a data set of the Hugging Face hub."""
        return self.name.startswith("hf:")

    @property
    def is_own(self) -> bool:
        """Whether it is what the dense model writes by itself."""
        return self.name == SELF

    @property
    def suffix(self) -> str:
        """File ending in lower case, that of the compression aside."""
        path = Path(self.name)
        return Path(path.stem).suffix.lower() if path.suffix.lower() in COMPRESSED else path.suffix.lower()

    @property
    def is_table(self) -> bool:
        """Whether it has rows and columns."""
        return self.is_hub or self.suffix in TABLES


@dataclass(frozen=True)
class Examples:
    """Texts, or pairs of texts, labelled or not.

    Attributes
    ----------
    texts, seconds
        The text of each example, or both of a pair.
    labels
        Names or numbers of classes; of regressions and of several labels, numbers for each (`calibration.several`).
    class_names
        Names of the classes that are numbered, where the data set says them: its numbers may not be the model's.
    """

    texts: list[str]
    labels: list[Any] | None
    seconds: list[str] | None = None
    class_names: Sequence[str] | None = None

    def picked(self, numbers: Sequence[int]) -> Examples:
        """Return the examples of these numbers."""
        labels, seconds = (None if part is None else [part[i] for i in numbers] for part in (self.labels, self.seconds))
        return Examples([self.texts[i] for i in numbers], labels, seconds, self.class_names)


def pieces(source: Source, render: Render | None = None) -> Iterator[str]:
    """Read a source as one text, a piece at a time; the texts of a table with a blank line between them.

    Conversations follow one another as the chat template ends them.

    Parameters
    ----------
    render
        Makes a text of a conversation; without it a column of conversations is refused.

    Raises
    ------
    CalibrationError, InputError
        It is missing, empty, not text, or has no such column.
    """
    blank = True
    for piece in _row_pieces(source, render) if source.is_table else _file_pieces(source):
        blank = blank and not piece.strip()
        yield piece
    if blank:
        raise CalibrationError(f"{source.name} holds no text. Pass a file with text in it.")


def read_text(source: Source, render: Render | None = None) -> str:
    """Read a source as one text, whole; see `pieces`."""
    return "".join(pieces(source, render))


def _file_pieces(source: Source) -> Iterator[str]:
    if source.text_column is not None:
        raise InputError(
            f"{source.name} is no table; --text-column is for {', '.join(TABLES)} files and hf: data sets."
        )
    return read_pieces(source.name)


def _row_pieces(source: Source, render: Render | None) -> Iterator[str]:
    column, length = None, 0
    for place, row in open_table(source)[0]:
        column, first = column or _text_column(source, row), column is None
        cell = Cell.find(row, column, place, source.name)
        text = cell.rendered(render)
        yield text if first or not isinstance(cell.value, str) else f"\n\n{text}"
        length += len(text)
        if source.is_hub and length > HUB_TEXT:
            raise CalibrationError(
                f"{source.name} has more than {HUB_TEXT:,} characters of text. Name a slice of it, such as "
                f"{':'.join([*source.name.split(':'), '', ''][:3])}:train[:10000]."
            )


def open_table(source: Source) -> tuple[Iterator[Row], Any]:
    """Return the rows of a table, and for a hub data set what its columns are said to be."""
    if not source.is_hub:
        return TABLES[source.suffix](source.name), {}
    data = load_hub(source.name)
    known = data.features or {}
    named = [] if source.text_column is None else [source.text_column, *source.text_column.split(",")]
    labels = [] if source.label_column is None else [source.label_column, *source.label_column.split(",")]
    wanted = [*(named or USUAL), *labels]
    chosen = {name if name in known else name.split(".")[0] for name in wanted} & set(known)
    # The others, perhaps pictures, are not even decoded.
    return hub_rows(data.select_columns(sorted(chosen)) if chosen else data, source.name), known


def _text_column(source: Source, row: Mapping[str, Any]) -> str:
    """Say which column holds the text: the one that was named, or a usual one."""
    if source.text_column is not None:
        if "," in source.text_column and source.text_column not in row:
            raise InputError("Two columns in --text-column are for classifiers; plain text comes from one.")
        return source.text_column
    usual = next((name for name in USUAL if name in row), None)
    if usual is None:
        raise InputError(
            f"{source.name} is a table without a column {' or '.join(USUAL)}; name the column that holds the text with "
            f"--text-column: {shown(row)}."
        )
    return usual


def rows_of(source: Source) -> Iterator[Row]:
    """Read the rows of a table or data set, those columns of which it names.

    Raises
    ------
    CalibrationError, InputError
        It is missing, is no table, or cannot be read.
    """
    if not source.is_table:
        raise InputError(f"{source.name} is no table; expected a {', '.join(TABLES)} file or an hf: data set.")
    return open_table(source)[0]


ReadLabel = Callable[[Row, Sequence[str] | None], Any]
"""Reads the label of a row; told the names of the classes that are numbered, where the data set says them."""


def read_examples(source: Source, limit: int | None = None, read: ReadLabel | None = None) -> Examples:
    """Read texts, or pairs of them, and labels if their column is named, from a table or data set.

    Parameters
    ----------
    limit
        Read so many rows at most.
    read
        Reads a label, where that is not the name or the number of a class.

    Raises
    ------
    CalibrationError, InputError
        Not a table, a column is missing, a value is no text, or there are no rows.
    """
    if not source.is_table:
        raise InputError(
            f"{source.name} is no table; examples come from {', '.join(TABLES)} files or hf: data sets, and need "
            "--text-column."
        )
    found_rows, known = open_table(source)
    rows = islice(found_rows, limit)
    first = next(rows, None)
    if first is None:
        raise CalibrationError(f"{source.name} has no rows. Pass a file with examples in it.")
    columns = _example_columns(source, first[1])
    found: list[list[str]] = [[] for _ in columns]
    labels: list[Any] | None = None if source.label_column is None else []
    feature = known.get(source.label_column)
    names = getattr(getattr(feature, "feature", feature), "names", None)
    for place, row in chain([first], rows):
        for column, texts in zip(columns, found, strict=True):
            texts.append(Cell.find(row, column, place, source.name).text())
        if labels is not None and source.label_column is not None:
            found_label = read or (
                lambda row, _: Cell.find(row[1], source.label_column or "", row[0], source.name).label()
            )
            labels.append(found_label((place, row), names))
    return Examples(found[0], labels, found[1] if len(columns) == 2 else None, names)


def _example_columns(source: Source, row: Mapping[str, Any]) -> list[str]:
    if source.text_column is None or source.text_column in row:
        return [_text_column(source, row)]
    columns = source.text_column.split(",")
    if len(columns) > 2:
        raise InputError(f"--text-column names {len(columns)} columns; an example has one text, or a pair of them.")
    return columns


def shuffled(examples: Examples, samples: int, seed: int) -> Examples:
    """Take the first `samples` examples after a seeded shuffle."""
    order = torch.randperm(len(examples.texts), generator=torch.Generator().manual_seed(seed))[:samples].tolist()
    return examples.picked(order)
