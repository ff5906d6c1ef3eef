"""Grids of a page: names as short as can be, and what routers gave to experts."""

from __future__ import annotations

import math

import pytest

from lowrank_compress.pages.facts import place_of
from lowrank_compress.pages.grids import Cell, collective, experts, grid, shortened


def test_names_are_as_short_as_tells_them_apart() -> None:
    names = ["attention.output.dense", "intermediate.dense", "output.dense", "attention.self.query"]
    assert shortened(names) == {
        "attention.output.dense": "attention.output.dense",
        "intermediate.dense": "intermediate.dense",
        "output.dense": "output.dense",
        "attention.self.query": "query",
    }
    assert shortened(["mlp", "mlp"]) == {"mlp": "mlp"}


@pytest.mark.parametrize(
    ("name", "place", "together"),
    [
        ("model.layers.11.self_attn.q_proj", (11, "self_attn.q_proj"), "self_attn.q_proj"),
        ("model.layers.2.mlp.experts.7.lr_up", (2, "mlp.experts.7.lr_up"), "mlp.experts.lr_up"),
        ("model.layers.2.mlp.experts.7", (2, "mlp.experts.7"), "mlp.experts"),
        ("model.layers.0:experts", (0, "experts"), "experts"),
        ("lm_head", (None, "lm_head"), "lm_head"),
    ],
)
def test_places_of_names(name: str, place: tuple[int | None, str], together: str) -> None:
    assert place_of(name) == place
    assert collective(place[1]) == together


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
