"""Charts as SVG to stand in a page: text stays text, colours are the page's, so that it is light or dark as that is."""

from __future__ import annotations

import importlib
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lowrank_compress.errors import InputError

# Colours that matplotlib draws with, and what stands for them in the page.
INK, MUTED, GRID = "#010101", "#020202", "#030303"
SERIES = tuple(f"#0{number}0{number}f{number}" for number in range(1, 9))
_PAGE = {INK: "var(--ink)", MUTED: "var(--muted)", GRID: "var(--grid)"}
_PAGE |= {colour: f"var(--series-{number})" for number, colour in enumerate(SERIES, 1)}
MARKERS = "osD^vPX*"
MOST_POINTS = 160
# Characters that stand beside each other in a legend.
LEGEND = 88
STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 11,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "text.color": INK,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}


@dataclass(frozen=True)
class Point:
    """A run in a chart of size against quality."""

    group: str
    name: str
    megabytes: float
    value: float


@dataclass(frozen=True)
class Spectrum:
    """A spectrum, largest value 1, and the rank that it is cut at; None where it is not."""

    values: Sequence[float]
    cut: int | None


def library() -> Any:
    """Return matplotlib, which is no dependency of the package itself.

    Raises
    ------
    InputError
        It is not installed.
    """
    try:
        return importlib.import_module("matplotlib")
    except ImportError:
        raise InputError(
            "A report draws charts with matplotlib, which is not installed: pip install 'lowrank_compress[report]'."
        ) from None


def _figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Any, list[Any]]:
    figure = importlib.import_module("matplotlib.figure").Figure(figsize=(width, height), dpi=96)
    axes = figure.subplots(rows, columns, squeeze=False, sharey=True)
    return figure, list(axes.flat)


def _svg(figure: Any, label: str) -> str:
    """Render, with the page's colours in the place of ours; the same bytes each time."""
    matplotlib, out = library(), io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": label}):
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'font: ([^;"]*?)(\d[\d.]*)px [^;"]*', r"font: \1\2px var(--font)", text)
    for colour, stands in _PAGE.items():
        text = text.replace(colour, stands)
    return re.sub(r"<svg ", '<svg role="img" ', text, count=1)


def _logarithmic(axes: Any, subs: tuple[int, ...] = (1,)) -> None:
    """Make the vertical axis logarithmic, with plain numbers at its ticks."""
    ticker = importlib.import_module("matplotlib.ticker")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(ticker.LogLocator(base=10, subs=subs, numticks=7))
    axes.yaxis.set_minor_locator(ticker.NullLocator())
    axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: plain(value)))


def plain(value: float) -> str:
    """Write a number as it stands at a tick: 20, 0.01, 10⁻⁶."""
    if 1e-3 <= value < 1e5:
        return f"{value:g}"
    digits, power = f"{value:e}".split("e")
    raised = str(int(power)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"10{raised}" if float(digits) == 1 else f"{float(digits):g}·10{raised}"


def trade(points: Sequence[Point], dense: Sequence[tuple[float, float]], metric: str, *, less_is_better: bool) -> str:
    """Draw size against a measure, a line for each group, and mark what no other point beats in both.

    Parameters
    ----------
    points
        Runs.
    dense
        Size in megabytes and measure of each dense original.
    metric
        What it is called.
    less_is_better
        Whether a smaller value is the better one.
    """
    matplotlib = library()
    with matplotlib.rc_context(STYLE):
        groups: dict[str, list[Point]] = {}
        for point in points:
            groups.setdefault(point.group, []).append(point)
        columns = max(1, min(4, LEGEND // (max(map(len, groups)) + 6)))
        figure, (axes,) = _figure(7.4, 4.0 + 0.2 * -(-(len(groups) + 2) // columns))
        for number, (group, members) in enumerate(groups.items()):
            line = sorted(members, key=lambda point: point.megabytes)
            axes.plot(
                [point.megabytes for point in line],
                [point.value for point in line],
                marker=MARKERS[number % len(MARKERS)],
                color=SERIES[number % len(SERIES)],
                linewidth=1.6,
                markersize=6,
                label=group,
            )
        best = frontier(points, less_is_better=less_is_better)
        axes.scatter(
            [point.megabytes for point in best],
            [point.value for point in best],
            s=130,
            facecolors="none",
            edgecolors=INK,
            linewidths=1.0,
            label="beaten by none",
            zorder=4,
        )
        if dense:
            axes.scatter(
                [size for size, _ in dense],
                [value for _, value in dense],
                marker="*",
                s=120,
                color=INK,
                label="dense original",
                zorder=5,
            )
        values = [point.value for point in points] + [value for _, value in dense]
        if min(values) > 0 and max(values) / min(values) > 5:
            _logarithmic(axes, subs=(1, 2, 5))
        axes.set_xlabel("size of the checkpoint, MB")
        axes.set_ylabel(metric)
        figure.legend(loc="outside lower center", ncols=columns, fontsize=10)
        return _svg(figure, f"trade {metric}")


def frontier(points: Sequence[Point], *, less_is_better: bool) -> list[Point]:
    """Return the points that no other is at least as good as in both, and better in one."""

    def beats(one: Point, other: Point) -> bool:
        gain = other.value - one.value if less_is_better else one.value - other.value
        return one.megabytes <= other.megabytes and gain >= 0 and (one.megabytes < other.megabytes or gain > 0)

    return [point for point in points if not any(beats(other, point) for other in points)]


def spectra(kinds: Mapping[str, Sequence[Spectrum]]) -> str:
    """Draw the spectra of each kind of matrix, later blocks in fuller colour, with a dot where each is cut."""
    matplotlib = library()
    columns = min(4, len(kinds))
    rows = -(-len(kinds) // columns)
    shown = [value for members in kinds.values() for member in members for value in member.values if value > 0]
    # Whole decades, so that what is small is seen and what is rounding is not.
    bottom = 10.0 ** max(-7, math.floor(math.log10(min(shown) / 1.5)))
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure(max(2.6, 2.5 * columns), 2.1 * rows + 0.3, rows, columns)
        for place, (kind, members) in zip(axes, kinds.items(), strict=False):
            for number, member in enumerate(members):
                depth = 0.25 + 0.75 * (number + 1) / len(members)
                points = thinned(member.values)
                place.plot([x for x, _ in points], [y for _, y in points], color=SERIES[0], alpha=depth, linewidth=1.1)
                if member.cut and member.cut <= len(member.values):
                    height = max(member.values[member.cut - 1], bottom)
                    place.plot([member.cut], [height], marker="o", color=SERIES[1], markersize=4, linestyle="none")
            _logarithmic(place)
            place.set_ylim(bottom, 2)
            place.set_title(kind, loc="left")
        for place in axes[len(kinds) :]:
            place.set_visible(False)
        figure.supxlabel("number of the direction", fontsize=11)
        figure.supylabel("share of the largest", fontsize=11)
        return _svg(figure, "spectra")


def thinned(values: Sequence[float]) -> list[tuple[int, float]]:
    """Number values from 1, and keep as many as a chart can show, the first and the last among them."""
    step = max(1, -(-len(values) // MOST_POINTS))
    kept = [*range(0, len(values) - 1, step), len(values) - 1] if len(values) else []
    return [(index + 1, max(values[index], 1e-9)) for index in kept]


def losses(predicted: Mapping[int, float], measured: Sequence[tuple[float, float]], unit: str) -> str:
    """Draw what each block was predicted to lose and what it loses by itself, in a unit."""
    matplotlib = library()
    with matplotlib.rc_context(STYLE):
        figure, (axes,) = _figure(7.4, 3.4)
        rows = [("predicted", predicted)] if predicted else []
        if measured:
            rows.append(("measured, this block alone", {block: pair[0] for block, pair in enumerate(measured)}))
            rows.append(("divergence, this block alone", {block: pair[1] for block, pair in enumerate(measured)}))
        width = 0.8 / len(rows)
        for number, (name, values) in enumerate(rows):
            places = [block + (number - (len(rows) - 1) / 2) * width for block in values]
            axes.bar(places, list(values.values()), width=0.92 * width, color=SERIES[number], label=name)
        axes.xaxis.set_major_locator(importlib.import_module("matplotlib.ticker").MaxNLocator(integer=True))
        axes.set_xlabel("block")
        axes.set_ylabel(unit)
        axes.grid(axis="x", visible=False)
        if len(rows) > 1:
            figure.legend(loc="outside lower center", ncols=3, fontsize=10)
        return _svg(figure, "losses")
