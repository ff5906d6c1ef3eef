"""Rows of table files, one at a time, with the values as they are.

The readers of Python and Arrow are used directly and not through `datasets`, which stands on Arrow and pandas: it gives
all values of a column one type, so that texts such as "2020-01-01", "123" or "None" come back as a date, a number and
nothing; and it writes a copy of the table.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from lowrank_compress.calibration.textfiles import check_file, read_lines, read_pieces
from lowrank_compress.errors import CalibrationError

Row = tuple[str, Mapping[str, Any]]
"""What a row is called in a message ("Row 3", "Line 7"), and its values by column."""

# A row larger than this is a mistake, such as a quote that is never closed.
ROW = 1 << 28


def shown(names: Any) -> str:
    """List names for a message; what cannot be printed is escaped."""
    texts = map(str, names)
    return ", ".join(text if text.isprintable() else ascii(text) for text in texts) or "none"


def _json_lines(name: str) -> Iterator[Row]:
    for number, line in enumerate(read_lines(name), 1):
        if line.strip():
            yield f"Line {number}", _object(f"Line {number}", _parsed(line, f"Line {number}", name), name)


def _parsed(text: str, place: str, name: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise CalibrationError(f"{place} of {name} is nested too deep to be read.") from None
    except ValueError as problem:
        raise CalibrationError(f"{place} of {name} is not JSON ({problem}).") from None


def _object(place: str, value: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise CalibrationError(f"{place} of {name} is a JSON {type(value).__name__}; expected an object.")
    return value


def _json(name: str) -> Iterator[Row]:
    """Read an array of objects, or objects one after the other, without holding more than one."""
    for number, value in enumerate(_json_values(read_pieces(name), name), 1):
        yield f"Row {number}", _object(f"Row {number}", value, name)


_SPACE = re.compile(r"\s*")


class _Pieces:
    """A text that comes in pieces, read value by value."""

    def __init__(self, pieces: Iterator[str], name: str) -> None:
        self._pieces, self._name = pieces, name
        self._text, self._at, self._number = "", 0, 0
        self._decoder = json.JSONDecoder()

    def ahead(self) -> str:
        """The next character that is no white space; nothing at the end."""
        while True:
            self._at = _SPACE.match(self._text, self._at).end()  # pyright: ignore[reportOptionalMemberAccess]
            if self._at < len(self._text):
                return self._text[self._at]
            self._text, self._at = next(self._pieces, ""), 0
            if not self._text:
                return ""

    def skip(self) -> None:
        """Go past that character."""
        self._at += 1

    def value(self) -> Any:
        """Read the next value, with as much text as it has."""
        self._number += 1
        while True:
            try:
                found, self._at = self._decoder.raw_decode(self._text, self._at)
                return found
            except RecursionError:
                raise CalibrationError(f"Row {self._number} of {self._name} is nested too deep to be read.") from None
            except ValueError as problem:
                length = len(self._text) - self._at
                more = _as_much_again(self._pieces, length)
                if not more or length > ROW:
                    raise CalibrationError(f"Row {self._number} of {self._name} is not JSON ({problem}).") from None
                self._text, self._at = self._text[self._at :] + more, 0


def _json_values(pieces: Iterator[str], name: str) -> Iterator[Any]:
    text = _Pieces(pieces, name)
    if text.ahead() != "[":
        while text.ahead():
            yield text.value()
        return
    text.skip()
    row = 0
    while (following := text.ahead()) != "]" or row:
        if not following:
            raise CalibrationError(f"{name} is a JSON array that does not end. Is the file whole?")
        row += 1
        yield text.value()
        following = text.ahead()
        if following == "]":
            break
        if following == ",":
            text.skip()
        elif following:
            raise CalibrationError(f"Row {row} of {name} is followed by {following!r}; expected a comma or ].")
    text.skip()
    if rest := text.ahead():
        raise CalibrationError(f"{name} goes on behind its JSON array, with {rest!r}. Is it damaged?")


def _as_much_again(pieces: Iterator[str], length: int) -> str:
    found: list[str] = []
    while sum(map(len, found)) < length and (piece := next(pieces, "")):
        found.append(piece)
    return "".join(found)


def _comma_separated(name: str) -> Iterator[Row]:
    return _separated(name, csv.reader(read_lines(name), strict=True))


def _tab_separated(name: str) -> Iterator[Row]:
    quoting = csv.QUOTE_MINIMAL if quotes_are_marks(read_lines(name)) else csv.QUOTE_NONE
    return _separated(name, csv.reader(read_lines(name), delimiter="\t", quoting=quoting, strict=True))


def _separated(name: str, lines: Any) -> Iterator[Row]:
    csv.field_size_limit(ROW)
    names: list[str] = []
    number = 0
    try:
        names = next(lines, [])
        twice = next((each for each in names if names.count(each) > 1), None)
        if twice is not None:
            raise CalibrationError(f"{name} has two columns {twice!r}. Name them differently.")
        for values in lines:
            if not values:
                continue
            number += 1
            if len(values) != len(names):
                raise CalibrationError(
                    f"Row {number} of {name} has {len(values)} values under {len(names)} column names "
                    f"({shown(names)}). Repair the row."
                )
            yield f"Row {number}", dict(zip(names, values, strict=True))
    except csv.Error as problem:
        raise CalibrationError(
            f"Row {number + 1} of {name} cannot be read ({problem}). A text that has quotation marks is put between "
            "such, and its own are written twice."
        ) from None


_FIELD = re.compile(r'"([^"]*(?:""[^"]*)*)"|([^"\t\n]*)')
_Field = tuple[str, bool]  # a value, and whether it is enclosed in quotation marks


def quotes_are_marks(lines: Iterator[str]) -> bool:
    """Tell whether quotation marks in tab-separated lines enclose values, or are characters of them.

    Both kinds exist: pandas encloses values that hold a tab, a quotation mark or a line end, R all values that are no
    numbers; GLUE's files enclose nothing, and have sentences with a quotation mark that nobody closes, or that is
    closed some rows later. They are marks if a writer of the first kind would have written the whole file so, and no
    value over several lines could be as many rows.
    """
    needed = always = True
    columns, record, marks, size = 0, [], 0, 0
    for line in lines:
        record.append(line)
        marks += line.count('"')
        if marks % 2:
            size += len(line)
            if size > ROW:
                return False
            continue
        if any(map(str.strip, record)):
            fields = _fields("".join(record))
            columns = columns or len(fields)
            rows = columns > 1 < len(record) and all(each.count("\t") == columns - 1 for each in record)
            if len(fields) != columns or rows:
                return False
            needed = needed and all(_needs(value) == enclosed or not value for value, enclosed in fields)
            always = always and all(enclosed or not value or _is_number(value) for value, enclosed in fields)
            if not (needed or always):
                return False
        record, marks, size = [], 0, 0
    return not record


def _fields(record: str) -> list[_Field]:
    """Split a record where quotation marks enclose values; nothing where they do not."""
    text, at, found = record.removesuffix("\n"), 0, []
    while (match := _FIELD.match(text, at)) is not None:
        found.append((match[2], False) if match[1] is None else (match[1].replace('""', '"'), True))
        at = match.end() + 1
        if at > len(text):
            return found
        if text[at - 1] != "\t":
            break
    return []


def _needs(value: str) -> bool:
    return any(mark in value for mark in '"\t\n')


def _is_number(value: str) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return True


def _parquet(name: str) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    check_file(name)
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(name) as file:
            for batch in file.iter_batches(batch_size=256):
                for row in batch.to_pylist():
                    number += 1
                    yield f"Row {number}", row
    except (pyarrow.ArrowException, OSError, ValueError) as problem:
        first = (str(problem).strip().splitlines() or [type(problem).__name__])[0]
        raise CalibrationError(
            f"{name} cannot be read as Parquet ({first}). Is it whole, and not compressed?"
        ) from None


TABLES: Mapping[str, Callable[[str], Iterator[Row]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": _comma_separated,
    ".tsv": _tab_separated,
    ".parquet": _parquet,
}
"""Readers of table files, by the file's ending."""
