"""Rows of table files, one at a time, with the values as they are.

The readers of Python and Arrow are used directly, because `datasets`, which stands on the latter, makes all values of a
column of one type: a number among texts would become a text.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lowrank_compress.artifacts.files import is_regular
from lowrank_compress.errors import CalibrationError

COMPRESSED: Mapping[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
# A JSON array is parsed whole.
ARRAY_BYTES = 1 << 30
FIELD = 2**31 - 1


def check_file(name: str) -> None:
    """Refuse what is no readable, regular file, saying what it is.

    Raises
    ------
    CalibrationError
        It is missing, a directory, a pipe or device, or may not be read.
    """
    path = Path(name)
    if path.is_dir():
        raise CalibrationError(f"{name} is a directory; expected a text file or a table. Name the file in it.")
    if not is_regular(path):
        if path.exists() or path.is_symlink():
            raise CalibrationError(f"{name} is no regular file; expected a text file or a table.")
        raise CalibrationError(
            f"The text file {name} does not exist. Pass an existing file, or hf:NAME[:CONFIG[:SPLIT]]."
        )
    try:
        with open(path, "rb"):
            pass
    except OSError as problem:
        raise CalibrationError(f"{name} is there, but cannot be read ({problem.strerror}).") from None


def open_text(name: str, newline: str | None = None) -> io.TextIOBase:
    """Open a UTF-8 file, with or without a byte order mark, compressed or not.

    Raises
    ------
    CalibrationError
        See `check_file`.
    """
    check_file(name)
    opener = COMPRESSED.get(Path(name).suffix.lower(), open)
    return opener(name, "rt", encoding="utf-8-sig", newline=newline)


_SIGNATURES = {
    b"\x1f\x8b": "a file that is gzip-compressed; call it .gz",
    b"BZh": "a file that is bzip2-compressed; call it .bz2",
    b"\xfd7zXZ": "a file that is xz-compressed; call it .xz",
    b"\x28\xb5\x2f\xfd": "a file that is zstd-compressed; unpack it first",
    b"PK\x03\x04": "a zip archive or an office document; unpack it first",
    b"PAR1": "a Parquet table; call it .parquet",
    b"ARROW1": "an Arrow file; convert it to .parquet",
    b"%PDF": "a PDF document; extract its text first",
    b"\xff\xfe": "UTF-16 text; convert it to UTF-8",
    b"\xfe\xff": "UTF-16 text; convert it to UTF-8",
}


def described(name: str) -> str:
    """Say what a file that is no UTF-8 text looks like, if it has the mark of something known."""
    with open(name, "rb") as file:
        start = file.read(8)
    found = next((what for mark, what in _SIGNATURES.items() if start.startswith(mark)), None)
    return f"; it looks like {found}" if found else ""


def file_rows(name: str, suffix: str) -> Iterator[dict[str, Any]]:
    """Read the rows of a table file.

    Raises
    ------
    CalibrationError
        It cannot be read, or is not what its name says; the message names the row.
    """
    check_file(name)
    try:
        yield from TABLES[suffix](name)
    except CalibrationError:
        raise
    except (UnicodeDecodeError, OSError, EOFError, csv.Error, ValueError, lzma.LZMAError) as problem:
        first = (str(problem).strip().splitlines() or [type(problem).__name__])[0]
        raise CalibrationError(
            f"{name} cannot be read as {suffix.removeprefix('.')} ({first}){described(name)}."
        ) from None


def _lines(name: str) -> Iterator[dict[str, Any]]:
    with open_text(name, newline="\n") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as problem:
                raise CalibrationError(f"Line {number} of {name} is not JSON ({problem}).") from problem
            if not isinstance(row, dict):
                raise CalibrationError(f"Line {number} of {name} is a JSON {type(row).__name__}; expected an object.")
            yield row


def _array(name: str) -> Iterator[dict[str, Any]]:
    """Read a JSON array of objects; a file of that ending may also hold one object a line."""
    with open_text(name) as file:
        start = file.read(1)
        while start.isspace():
            start = file.read(1)
    if start != "[":
        yield from _lines(name)
        return
    if Path(name).stat().st_size > ARRAY_BYTES:
        raise CalibrationError(
            f"{name} is one JSON array of more than 1 GiB. Convert it to one object a line (.jsonl)."
        )
    with open_text(name) as file:
        try:
            found = json.load(file)
        except RecursionError:
            raise CalibrationError(f"{name} is nested too deep to be read.") from None
    for number, row in enumerate(found, 1):
        if not isinstance(row, dict):
            raise CalibrationError(f"Row {number} of {name} is a JSON {type(row).__name__}; expected an object.")
        yield row


def _separated(delimiter: str) -> Callable[[str], Iterator[dict[str, Any]]]:
    def read(name: str) -> Iterator[dict[str, Any]]:
        csv.field_size_limit(FIELD)
        quoted = _is_quoted(name, delimiter)
        with open_text(name) as file:
            found = csv.reader(file, delimiter=delimiter, quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE)
            names = next(found, [])
            if len(set(names)) != len(names):
                twice = next(each for each in names if names.count(each) > 1)
                raise CalibrationError(f"{name} has two columns {twice!r}. Name them differently.")
            number = 0
            for values in found:
                if not values:
                    continue
                number += 1
                if len(values) != len(names):
                    raise CalibrationError(
                        f"Row {number} of {name} has {len(values)} values under {len(names)} column names "
                        f"({', '.join(names)}). Repair the row."
                    )
                yield dict(zip(names, values, strict=True))

    return read


def _is_quoted(name: str, delimiter: str) -> bool:
    """Whether quotes around values are marks, as pandas writes them, or characters, as in GLUE's .tsv files.

    They are marks in every .csv. In a .tsv they are marks if the whole file is well formed that way: every value that
    begins with a quote ends with one, and every row has as many values as the first.
    """
    if delimiter != "\t":
        return True
    with open_text(name) as file:
        try:
            found = csv.reader(file, delimiter=delimiter, strict=True)
            columns = len(next(found, []))
            return all(len(values) in (0, columns) for values in found)
        except csv.Error:
            return False


def _parquet(name: str) -> Iterator[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(name) as file:
            for batch in file.iter_batches(batch_size=256):
                yield from batch.to_pylist()
    except pyarrow.ArrowException as problem:
        raise CalibrationError(f"{name} cannot be read as Parquet ({str(problem).splitlines()[0]}).") from None


TABLES: Mapping[str, Callable[[str], Iterator[dict[str, Any]]]] = {
    ".jsonl": _lines,
    ".ndjson": _lines,
    ".json": _array,
    ".csv": _separated(","),
    ".tsv": _separated("\t"),
    ".parquet": _parquet,
}
"""Readers of table files, by the file's ending."""
