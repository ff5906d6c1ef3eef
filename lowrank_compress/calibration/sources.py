"""Where calibration and evaluation text comes from: files, tables and data sets of the hub."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from lowrank_compress.errors import CalibrationError, InputError

if TYPE_CHECKING:
    import datasets

PAPERS_DATA = "hf:Salesforce/wikitext:wikitext-2-raw-v1:train"
TABLES = {".csv": ",", ".tsv": "\t"}


@dataclass(frozen=True)
class Source:
    """Where text comes from.

    Attributes
    ----------
    name
        A text file; a .jsonl, .csv or .tsv file (with `text_column`); or ``hf:NAME[:CONFIG[:SPLIT]]``.
    text_column, label_column
        Columns of a table. `label_column` makes labelled examples for a classifier.
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
        """File ending in lower case."""
        return Path(self.name).suffix.lower()


@dataclass(frozen=True)
class Examples:
    """Texts, labelled or not."""

    texts: list[str]
    labels: list[str] | None

    def first(self, count: int | None) -> Examples:
        """Return the first `count` examples; None for all."""
        return Examples(self.texts[:count], None if self.labels is None else self.labels[:count])


def read_text(source: Source) -> str:
    """Read a source as one text; rows of a table or data set are joined by blank lines.

    Raises
    ------
    CalibrationError
        It is missing, empty, or has no such column.
    """
    if source.is_hub:
        rows = _hub_rows(source)
        column = source.text_column or "text"
        text = "\n\n".join(str(row) for row in _column(rows, column, source))
    elif source.suffix in TABLES or source.suffix == ".jsonl":
        if source.text_column is None:
            raise InputError(f"{source.name} is a table; name the column that holds the text with --text-column.")
        text = "\n\n".join(_column(_file_rows(source), source.text_column, source))
    else:
        text = _read_file(source)
    if not text.strip():
        raise CalibrationError(f"{source.name} holds no text. Pass a file with text in it.")
    return text


def read_examples(source: Source) -> Examples:
    """Read texts, and labels if their column is named, from a table or data set.

    Raises
    ------
    CalibrationError, InputError
        Not a table, a column is missing, or there are no rows.
    """
    if source.text_column is None:
        raise InputError("Examples need --text-column and a .jsonl, .csv or .tsv file or an hf: data set.")
    rows = _hub_rows(source) if source.is_hub else _file_rows(source)
    texts = _column(rows, source.text_column, source)
    labels = None if source.label_column is None else _column(rows, source.label_column, source)
    if not texts:
        raise CalibrationError(f"{source.name} has no rows. Pass a file with examples in it.")
    if labels is not None and not len(texts) == len(labels) == len(rows):
        raise CalibrationError(
            f"{source.name} has {len(texts)} texts and {len(labels)} labels in {len(rows)} rows. Fill in or remove the "
            "incomplete rows."
        )
    return Examples(texts, labels)


def _read_file(source: Source) -> str:
    try:
        return Path(source.name).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise CalibrationError(
            f"The text file {source.name} does not exist. Pass an existing file, or hf:NAME[:CONFIG[:SPLIT]]."
        ) from None
    except (UnicodeDecodeError, OSError) as problem:
        raise CalibrationError(f"{source.name} cannot be read as UTF-8 text ({problem}).") from problem


def _file_rows(source: Source) -> list[dict[Any, Any]]:
    if source.suffix not in TABLES and source.suffix != ".jsonl":
        raise InputError(f"{source.name} is no table; a column can be named for .jsonl, .csv and .tsv files only.")
    text = _read_file(source)
    if source.suffix in TABLES:
        quoting = csv.QUOTE_NONE if source.suffix == ".tsv" else csv.QUOTE_MINIMAL
        csv.field_size_limit(max(len(text), csv.field_size_limit()))
        return list(csv.DictReader(io.StringIO(text), delimiter=TABLES[source.suffix], quoting=quoting))
    rows = []
    # Not `splitlines`: JSON may hold other line ends, such as U+2028, within a string.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as problem:
            raise CalibrationError(f"Line {number} of {source.name} is not JSON ({problem}).") from problem
        if not isinstance(row, dict):
            raise CalibrationError(
                f"Line {number} of {source.name} is a JSON {type(row).__name__}; expected an object."
            )
        rows.append(row)
    return rows


def _column(rows: Sequence[dict[Any, Any]], column: str, source: Source) -> list[str]:
    if rows and column not in rows[0]:
        raise InputError(f"{source.name} has no column {column!r}; it has {', '.join(map(str, rows[0]))}.")
    return [str(row[column]) for row in rows if row.get(column) is not None]


def load_hub(source: Source) -> datasets.Dataset:
    """Load a data set ``hf:NAME[:CONFIG[:SPLIT]]`` of the hub, from the cache where it is there.

    Raises
    ------
    CalibrationError
        It is neither cached nor to be had.
    """
    name, config, split = [*source.name.removeprefix("hf:").split(":"), "", ""][:3]
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


def _hub_rows(source: Source) -> list[dict[Any, Any]]:
    return [dict(row) for row in load_hub(source)]


def shuffled(examples: Examples, samples: int, seed: int) -> Examples:
    """Take the first `samples` examples after a seeded shuffle."""
    order = torch.randperm(len(examples.texts), generator=torch.Generator().manual_seed(seed))[:samples].tolist()
    labels = None if examples.labels is None else [examples.labels[i] for i in order]
    return Examples([examples.texts[i] for i in order], labels)
