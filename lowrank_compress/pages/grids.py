"""What of a run is shown as a grid of coloured cells: blocks × matrices, layers or experts."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lowrank_compress.stages.routers import in_effect, shares_of

_EXPERT = re.compile(r"(?:.*?\.)?(\d+)\.(?:.+\.)?(\d+)")


@dataclass(frozen=True)
class Cell:
    """A cell: how full its colour is, from 0 to 1, two lines in it, and what it says when it is pointed at."""

    row: int | None
    column: str
    full: float
    line: str
    below: str
    title: str


def grid(cells: Iterable[Cell], ends: Mapping[int | None, str] | None = None) -> dict[str, Any]:
    """Arrange cells in the order in which their rows and columns come.

    Parameters
    ----------
    cells
        In any order.
    ends
        What stands behind a row, if something does.

    Returns
    -------
    dict
        ``columns``: names; ``rows``: number of the row, its cells, None where there is none, and what stands behind it.
    """
    known = {(cell.row, cell.column): cell for cell in cells}
    columns = list(dict.fromkeys(column for _, column in known))
    rows = list(dict.fromkeys(row for row, _ in known))
    return {
        "columns": columns,
        "rows": [(row, [known.get((row, column)) for column in columns], (ends or {}).get(row)) for row in rows],
    }


def experts(said: Mapping[str, Any]) -> dict[str, Any] | None:
    """Show what the routers gave to each expert, and what is left of it; None where there are none.

    Behind each row stands how many experts are in use: the exponential of the entropy of their shares.

    Parameters
    ----------
    said
        ``experts`` of lowrank.json, by path.
    """
    blocks: dict[int, list[tuple[str, str, Mapping[str, Any]]]] = {}
    for path, expert in said.items():
        if place := _EXPERT.fullmatch(path):
            blocks.setdefault(int(place[1]), []).append((place[2], path, expert))
    cells, ends, shares = [], {}, shares_of(said)
    for block, members in blocks.items():
        seen = [expert["tokens"] or 0 for *_, expert in members]
        total = sum(seen)
        for (number, path, expert), tokens in zip(members, seen, strict=True):
            kept = expert["stored"] / expert["dense"]
            known = expert["tokens"] is not None
            line = f"{100 * tokens / total:.0f} %" if known and total else "–"
            count = f"{tokens:,} tokens" if known else "not counted"
            cells.append(
                Cell(block, number, kept, line, "gone" if not kept else f"{100 * kept:.0f} %", f"{path}: {count}")
            )
        path = members[0][1].rpartition(".")[0]
        if path in shares:
            ends[block] = f"{in_effect(shares[path]):.1f} of {len(members)}"
    return grid(cells, ends) if cells else None
