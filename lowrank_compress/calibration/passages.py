"""Plain text as what embedding models read: passages, each a text of its own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator


def passages(pieces: Iterable[str], width: int) -> Iterator[str]:
    """Cut a text into its lines that are not blank, and those into parts of at most `width` characters.

    Parameters
    ----------
    pieces
        The text, in pieces of any length.
    """
    rest = ""
    for piece in pieces:
        *lines, rest = (rest + piece).split("\n")
        for line in lines:
            yield from _parts(line, width)
        while len(rest) > width:
            yield from _parts(rest[:width], width)
            rest = rest[width:]
    yield from _parts(rest, width)


def _parts(line: str, width: int) -> Iterator[str]:
    line = line.strip()
    for start in range(0, len(line), width):
        if part := line[start : start + width].strip():
            yield part
