from __future__ import annotations

import random
import sys
from xml.etree import ElementTree

import pytest

from lowrank_compress.errors import InputError
from lowrank_compress.pages import charts
from lowrank_compress.pages.charts import Point, Spectrum


def test_what_no_other_beats() -> None:
    generator = random.Random(0)
    for less in (True, False):
        points = [Point("g", str(i), generator.randint(1, 9), generator.randint(1, 9)) for i in range(40)]
        expected = []
        for one in points:
            beaten = False
            for other in points:
                better = other.value < one.value if less else other.value > one.value
                no_worse = better or other.value == one.value
                smaller = other.megabytes < one.megabytes
                beaten |= (smaller and no_worse) or (better and other.megabytes == one.megabytes)
            expected += [] if beaten else [one]
        assert charts.frontier(points, less_is_better=less) == expected


def test_values_are_thinned_and_keep_their_ends() -> None:
    values = [1 / (k + 1) for k in range(1000)]
    kept = charts.thinned(values)
    assert len(kept) <= charts.MOST_POINTS + 1
    assert (kept[0], kept[-1]) == ((1, 1.0), (1000, 0.001))
    assert all(height == values[place - 1] for place, height in kept)
    assert charts.thinned([3.0]) == [(1, 3.0)]
    assert charts.thinned([]) == []


@pytest.mark.parametrize(("value", "shown"), [(20.0, "20"), (0.01, "0.01"), (1e-6, "10⁻⁶"), (2e7, "2·10⁷")])
def test_numbers_at_ticks(value: float, shown: str) -> None:
    assert charts.plain(value) == shown


def test_charts_are_xml_in_the_colours_of_the_page_and_repeat() -> None:
    points = [Point("a $\\frac$ <b>", "1", 1.0, 30.0), Point("c", "2", 2.0, 2.0)]
    for draw in (
        lambda: charts.trade(points, [(3.0, 1.5)], "perplexity · x&y", less_is_better=True),
        lambda: charts.spectra({"q": [Spectrum([1.0, 0.1, 0.0], 2), Spectrum([1.0, 0.5], None)]}),
        lambda: charts.losses({0: 0.1, 1: 0.2}, [(0.1, 0.2), (0.0, 0.1)], "nats a token"),
    ):
        drawn = draw()
        assert drawn == draw()
        tree = ElementTree.fromstring(drawn)
        assert tree.tag.endswith("svg")
        assert "var(--ink)" in drawn
        assert "var(--series-1)" in drawn
        assert not any(colour in drawn for colour in (charts.INK, charts.MUTED, charts.GRID, *charts.SERIES))
    text = charts.trade(points, [], "perplexity", less_is_better=True)
    assert "a $\\frac$ &lt;b&gt;" in text


def test_without_matplotlib_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match=r"pip install 'lowrank_compress\[report\]'"):
        charts.library()
