"""Grids of a page, and what routers gave to experts."""

from __future__ import annotations

import math

from lowrank_compress.pages.grids import Cell, experts, grid


def test_cells_stand_in_the_order_in_which_they_come() -> None:
    cells = [Cell(row, column, 0.5, column, "", "") for row, column in ((1, "b"), (1, "a"), (0, "a"))]
    found = grid(cells, {0: "end"})
    assert found["columns"] == ["b", "a"]
    assert found["rows"] == [(1, [cells[0], cells[1]], None), (0, [None, cells[2]], "end")]


def test_what_routers_gave() -> None:
    def expert(tokens: int | None, stored: int) -> dict[str, object]:
        return {"tokens": tokens, "dense": 10, "stored": stored, "entries": []}

    said = {
        "model.layers.3.mlp.experts.0": expert(30, 10),
        "model.layers.3.mlp.experts.1": expert(10, 5),
        "model.layers.3.mlp.experts.2": expert(0, 0),
        "model.layers.4.mlp.experts.0": expert(None, 10),
    }
    found = experts(said)
    assert found is not None
    assert found["columns"] == ["0", "1", "2"]
    (block, cells, end), (other, unknown, none) = found["rows"]
    assert (block, other) == (3, 4)
    assert [(cell.line, cell.below) for cell in cells] == [("75 %", "100 %"), ("25 %", "50 %"), ("0 %", "gone")]
    in_use = math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    assert end == f"{in_use:.1f} of 3"
    assert (unknown[0].line, unknown[1], none) == ("–", None, None)
    assert experts({}) is None
