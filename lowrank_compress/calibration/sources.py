"""Where calibration and evaluation text comes from: files, tables and data sets of the hub.

Nothing is guessed: a value that is no text, a file that is not what its name says and a row that lacks a column are
errors that name row and column. Files are read a piece at a time, so that memory does not follow their size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from lowrank_compress.calibration.tables import COMPRESSED, TABLES, described, file_rows, open_text
from lowrank_compress.errors import CalibrationError, InputError

if TYPE_CHECKING:
    import datasets

PAPERS_DATA = "hf:Salesforce/wikitext:wikitext-2-raw-v1:train"
# Columns that are taken where none is named.
USUAL = ("text", "messages")
# Characters that are read at once.
PIECE = 1 << 18

Chat = list[dict[str, Any]]
Render = Callable[[Chat], str]
"""Makes one text of a conversation, as the model was trained to read it."""


@dataclass(frozen=True)
class Source:
    """Where text comes from.

    Attributes
    ----------
    name
        A text file; a table (.jsonl, .json, .csv, .tsv, .parquet); either also compressed (.gz, .bz2, .xz); or a data
        set of the hub, ``hf:NAME[:CONFIG[:SPLIT]]``, where the split may be a slice, ``train[:10%]``.
    text_column
        Column of a table that holds the text or the conversation; dots lead into nested values. Two columns, with a
        comma between them, are a pair of sentences for a classifier.
    label_column
        Column of the labels, for a classifier.
    """

    name: str
    text_column: str | None = None
    label_column: str | None = None

    @property
    def is_hub(self) -> bool:
        """Whether the source is a data set of the Hugging Face hub."""
        return self.name.startswith("hf:")

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
    """Texts, or pairs of texts, labelled or not."""

    texts: list[str]
    labels: list[str] | None
    seconds: list[str] | None = None

    def first(self, count: int | None) -> Examples:
        """Return the first `count` examples; None for all."""
        return self.picked(range(len(self.texts))[:count])

    def picked(self, numbers: range | list[int]) -> Examples:
        """Return the examples of these numbers."""
        labels, seconds = (None if part is None else [part[i] for i in numbers] for part in (self.labels, self.seconds))
        return Examples([self.texts[i] for i in numbers], labels, seconds)


def pieces(source: Source, render: Render | None = None) -> Iterator[str]:
    """Read a source as one text, a piece at a time; rows of a table are joined by blank lines.

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
    with open_text(source.name) as file:
        try:
            while piece := file.read(PIECE):
                if "\0" in piece:
                    raise CalibrationError(f"{source.name} holds NUL characters: it is no text. Pass a text file.")
                yield piece
        except (UnicodeDecodeError, OSError, EOFError) as problem:
            raise CalibrationError(
                f"{source.name} cannot be read as UTF-8 text ({problem}){described(source.name)}."
            ) from None


def _row_pieces(source: Source, render: Render | None) -> Iterator[str]:
    column: str | None = None
    for number, row in rows(source):
        column = column or _text_column(source, row)
        value = cell(row, column)
        if (chat := _conversation(value)) is not None:
            text = _rendered(chat, render, source, number, column)
        else:
            text = _text(value, source, number, column)
        yield text if number == 1 else f"\n\n{text}"


def read_examples(source: Source) -> Examples:
    """Read texts, or pairs of them, and labels if their column is named, from a table or data set.

    Raises
    ------
    CalibrationError, InputError
        Not a table, a column is missing, a value is no text, or there are no rows.
    """
    if source.text_column is None:
        raise InputError(f"Examples need --text-column, and a {', '.join(TABLES)} file or an hf: data set.")
    if not source.is_table:
        raise InputError(f"{source.name} is no table; examples come from {', '.join(TABLES)} files or hf: data sets.")
    columns = source.text_column.split(",")
    if len(columns) > 2:
        raise InputError(f"--text-column names {len(columns)} columns; an example has one text, or a pair of them.")
    found: list[list[str]] = [[] for _ in columns]
    labels: list[str] = []
    for number, row in rows(source):
        for column, texts in zip(columns, found, strict=True):
            texts.append(_text(_required(row, column, source), source, number, column))
        if source.label_column is not None:
            labels.append(_label(_required(row, source.label_column, source), source, number))
    if not found[0]:
        raise CalibrationError(f"{source.name} has no rows. Pass a file with examples in it.")
    seconds = found[1] if len(columns) == 2 else None
    return Examples(found[0], labels if source.label_column is not None else None, seconds)


def rows(source: Source) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Read a table row by row, numbered from 1."""
    table = (
        cast("Iterable[dict[str, Any]]", load_hub(source)) if source.is_hub else file_rows(source.name, source.suffix)
    )
    yield from enumerate(table, 1)


def cell(row: Mapping[str, Any], column: str) -> Any:
    """Look up a column, or a path with dots into nested values; None where it is not there."""
    if column in row:
        return row[column]
    value: Any = row
    for part in column.split("."):
        if isinstance(value, Mapping):
            value = value.get(part)
        elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            return None
    return value


def _required(row: Mapping[str, Any], column: str, source: Source) -> Any:
    if cell(row, column) is None and column.split(".")[0] not in row:
        raise InputError(f"{source.name} has no column {column!r}; it has {', '.join(map(str, row)) or 'none'}.")
    return cell(row, column)


def _text_column(source: Source, row: Mapping[str, Any]) -> str:
    """Say which column holds the text: the one that was named, or a usual one."""
    if source.text_column is not None:
        if "," in source.text_column and source.text_column not in row:
            raise InputError("Two columns in --text-column are for classifiers; plain text comes from one.")
        _required(row, source.text_column, source)
        return source.text_column
    usual = next((name for name in USUAL if name in row), None)
    if usual is None:
        raise InputError(
            f"{source.name} is a table without a column {' or '.join(USUAL)}; name the one that holds the text with "
            f"--text-column: {', '.join(map(str, row))}."
        )
    return usual


def _text(value: Any, source: Source, number: int, column: str) -> str:
    if isinstance(value, str) and value.isascii():
        return value
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise CalibrationError(
                f"Row {number} of {source.name} has half a character (a lone surrogate) in {column!r}. Repair the row."
            ) from None
        return value
    what = "nothing" if value is None else f"a {type(value).__name__}"
    raise CalibrationError(
        f"Row {number} of {source.name} has {what} in the column {column!r}; expected text. Name another column "
        "(dots lead into nested values, as in data.text), or repair the row."
    )


def _label(value: Any, source: Source, number: int) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, str | int) and value != "":
        return str(value)
    what = "nothing" if value in (None, "") else f"the {type(value).__name__} {value!r}"
    raise CalibrationError(
        f"Row {number} of {source.name} has {what} as label in the column {source.label_column!r}; expected the name "
        "or the number of a class."
    )


_ROLES = {"human": "user", "gpt": "assistant"}


def _conversation(value: Any) -> Chat | None:
    """Return a value as a conversation, if it is one: role and content, or from and value (ShareGPT)."""
    if not (isinstance(value, list) and value and all(isinstance(turn, Mapping) for turn in value)):
        return None
    if all("role" in turn and "content" in turn for turn in value):
        return [dict(turn) for turn in value]
    if all("from" in turn and "value" in turn for turn in value):
        return [{"role": _ROLES.get(turn["from"], turn["from"]), "content": turn["value"]} for turn in value]
    return None


def _rendered(chat: Chat, render: Render | None, source: Source, number: int, column: str) -> str:
    if render is None:
        raise InputError(
            f"The column {column!r} of {source.name} holds conversations, and the model's tokenizer has no chat "
            "template to make text of them. Name a column of plain text, or add chat_template.jinja to the checkpoint."
        )
    try:
        return _text(render(chat), source, number, column)
    except CalibrationError:
        raise
    except Exception as problem:  # whatever a template may raise
        first = (str(problem).strip().splitlines() or [type(problem).__name__])[0]
        raise CalibrationError(
            f"The chat template refuses the conversation in row {number} of {source.name} ({first}). Repair the row, "
            "or name another column."
        ) from None


def load_hub(source: Source) -> datasets.Dataset:
    """Load a data set ``hf:NAME[:CONFIG[:SPLIT]]`` of the hub, from the cache where it is there.

    Raises
    ------
    CalibrationError
        It is neither cached nor to be had.
    InputError
        The name does not have that form.
    """
    name, config, split = [*source.name.removeprefix("hf:").split(":", 2), "", ""][:3]
    if not name or "[" in name + config:
        raise InputError(
            f"{source.name} names no data set; expected hf:NAME[:CONFIG[:SPLIT]], for instance hf:NAME::train[:10] "
            "where the data set has one configuration."
        )
    import datasets

    try:
        data = datasets.load_dataset(name, config or None, split=split or "train")
    except Exception as problem:  # the datasets library raises many types
        first = (str(problem).strip().splitlines() or [type(problem).__name__])[0]
        raise CalibrationError(
            f"The data set {source.name} is neither cached nor to be had from the hub ({first}). "
            "Pass a text file with --calibration instead."
        ) from problem
    return cast("datasets.Dataset", data)


def shuffled(examples: Examples, samples: int, seed: int) -> Examples:
    """Take the first `samples` examples after a seeded shuffle."""
    order = torch.randperm(len(examples.texts), generator=torch.Generator().manual_seed(seed))[:samples].tolist()
    return examples.picked(order)
