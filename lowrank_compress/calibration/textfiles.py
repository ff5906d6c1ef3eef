"""Text files: opened only if they are what they should be, decompressed, decoded, a piece at a time."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from lowrank_compress.artifacts.files import is_regular
from lowrank_compress.errors import CalibrationError

# Characters that are read at once.
PIECE = 1 << 18
# Bytes that are looked at to tell what a file is.
_LOOK = 4096


def _zstandard(name: str) -> IO[bytes]:
    import pyarrow  # Python has this compression from 3.14 on

    return pyarrow.input_stream(name, compression="zstd")  # pyright: ignore[reportReturnType]


COMPRESSED: Mapping[str, Callable[[str], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _zstandard,
}
_MARKS = {".parquet": b"PAR1", ".gz": b"\x1f\x8b", ".bz2": b"BZh", ".xz": b"\xfd7zXZ", ".zst": b"\x28\xb5\x2f\xfd"}
_SIGNATURES = {
    **{_MARKS[ending]: f"a compressed file; give it the ending {ending}" for ending in COMPRESSED},
    b"PK\x03\x04": "a zip archive or an office document; unpack it",
    b"7z\xbc\xaf": "a 7-Zip archive; unpack it",
    b"PAR1": "a Parquet table; give it the ending .parquet",
    b"ARROW1": "an Arrow file; convert it to .parquet",
    b"SQLite": "an SQLite database; export a table as .csv",
    b"%PDF": "a PDF document; extract its text",
    b"\x89PNG": "a picture",
    b"\xff\xfe": "UTF-16 text; convert it to UTF-8 (iconv -f UTF-16 -t UTF-8)",
    b"\xfe\xff": "UTF-16 text; convert it to UTF-8 (iconv -f UTF-16 -t UTF-8)",
}


def check_file(name: str) -> None:
    """Refuse what is no readable, regular file with what its ending promises, saying what it is; reads three blocks.

    Raises
    ------
    CalibrationError
        It is missing, a directory, a pipe or device, may not be read, or is binary.
    """
    path = Path(name)
    try:
        if path.is_dir():
            raise CalibrationError(f"{name} is a directory; expected a text file or a table. Name the file in it.")
        if not is_regular(path):
            if os.path.lexists(path) and not path.is_symlink():
                raise CalibrationError(f"{name} is no regular file; expected a text file or a table.")
            path.stat()
        with open(path, "rb") as file:
            places = {0, path.stat().st_size // 2, max(0, path.stat().st_size - _LOOK)}
            blocks = [file.seek(place) * b"" + file.read(_LOOK) for place in sorted(places)]
    except (FileNotFoundError, NotADirectoryError):
        before, _, weight = name.rpartition(":")
        weighed = weight.replace(".", "", 1).isdigit() and not os.path.exists(before)
        also = f", nor {before}, which could have a weight" if weighed else ""
        raise CalibrationError(
            f"The text file {name} does not exist{also}. Pass an existing file, or hf:NAME[:CONFIG[:SPLIT]]."
        ) from None
    except (OSError, ValueError) as problem:
        raise CalibrationError(f"{name} cannot be read ({problem}). Expected a readable file.") from None
    ending = path.suffix.lower()
    if ending in _MARKS:
        if not blocks[0].startswith(_MARKS[ending]):
            raise CalibrationError(
                f"{name} is not what its ending {ending} says{_looks(blocks[0])}. Rename or repair it."
            )
    elif any(b"\0" in block for block in blocks):
        raise _binary(name, blocks[0])


def _looks(start: bytes) -> str:
    found = next((what for mark, what in _SIGNATURES.items() if start.startswith(mark)), None)
    return f"; it looks like {found}" if found else ""


def _binary(name: str, start: bytes = b"") -> CalibrationError:
    return CalibrationError(f"{name} holds NUL bytes: it is no UTF-8 text{_looks(start)}. Pass a text file or a table.")


def read_pieces(name: str) -> Iterator[str]:
    """Read a UTF-8 file, with or without a byte order mark, compressed or not; every line end becomes a line feed.

    Raises
    ------
    CalibrationError
        See `check_file`; it is not UTF-8, or its compression is damaged.
    """
    check_file(name)
    ending = Path(name).suffix.lower()
    try:
        with COMPRESSED.get(ending, io.FileIO)(name) as raw, io.TextIOWrapper(raw, encoding="utf-8-sig") as file:
            while piece := file.read(PIECE):
                if "\0" in piece:
                    raise _binary(name)
                yield piece
    except UnicodeDecodeError as problem:
        with open(name, "rb") as raw:
            what = "" if ending in COMPRESSED else _looks(raw.read(8))
        raise CalibrationError(f"{name} cannot be read as UTF-8 text ({problem}){what}. Convert it.") from None
    except (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error) as problem:
        raise CalibrationError(f"{name} cannot be read ({problem}). Is it whole?") from None


def read_lines(name: str) -> Iterator[str]:
    """Read a file by lines, line feed included. No other line end that Unicode knows ends one: JSON may hold such."""
    begun: list[str] = []
    for piece in read_pieces(name):
        *lines, rest = piece.split("\n")
        for line in lines:
            yield "".join([*begun, line, "\n"])
            begun.clear()
        begun.append(rest)
    if last := "".join(begun):
        yield last
