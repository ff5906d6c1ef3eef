"""The report of runs: one page that needs no network, opens from disk, and is light or dark as its reader's machine."""

from __future__ import annotations

import importlib
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from lowrank_compress.artifacts.files import read_bytes, write_text
from lowrank_compress.errors import InputError
from lowrank_compress.pages import charts
from lowrank_compress.pages.facts import RunFacts, facts_of
from lowrank_compress.pages.grids import Cell, experts, grid
from lowrank_compress.stages.naming import collective, place_of, shortened
from lowrank_compress.stages.reporting import Reporter, Silent
from lowrank_compress.stages.sweepconfig import AXES
from lowrank_compress.stages.table import STAGES
from lowrank_compress.texts import Place

MARK = "<!-- lrc report -->"
TEMPLATES = Path(__file__).parent / "templates"
# Options that do not tell ways of compressing apart.
UNSEEN = {*AXES, "micro_batch", "device", "text_column", "label_column"}
# Charts of size against a measure; more of them nobody looks at.
MOST_TRADES = 4
# Steps that took fewer seconds are not listed.
SHORTEST = 0.005
SMALLER_IS_BETTER = ("perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte")


def report(
    runs: Place | Sequence[Place],
    out: Place,
    *,
    text: Place | None = None,
    limit: int = 4,
    overwrite: bool = False,
    reporter: Reporter | None = None,
) -> Path:
    """Write one page about runs, as ``lrc report`` does; return where it is.

    Parameters
    ----------
    runs
        One finished run or more.
    out
        The page, .html.
    text
        A text to measure each block by itself on; None leaves that out.
    limit
        Windows of it, of up to 512 tokens.
    overwrite
        Replace another report. What is none is never replaced.
    reporter
        Told about progress and warnings.

    Raises
    ------
    LrcError
        A run is not finished, something else is at `out`, or a library of the extra ``report`` is not installed.
    """
    places = [runs] if isinstance(runs, str | PathLike) else list(runs)
    page = Path(out)
    refuse_foreign(page, overwrite)
    template = _template()
    charts.library()
    reporter = reporter or Silent()
    found = []
    for number, place in enumerate(places, 1):
        found.append(facts_of(Path(place), reporter, None if text is None else str(text), limit))
        reporter.advance("read", number, len(places))
    made = template.render(mark=MARK, **contents(found))
    write_text(page, made)
    return page


def refuse_foreign(page: Path, overwrite: bool) -> None:
    """Refuse to write a page over what is none, or over one that is not to be replaced.

    Raises
    ------
    InputError
        Such is there.
    """
    if not page.exists() and not page.is_symlink():
        return
    if not page.is_file() or MARK.encode() not in read_bytes(page)[:200]:
        raise InputError(f"--out {page} exists and is no report of this program. Choose another name.")
    if not overwrite:
        raise InputError(f"--out {page} exists. Choose another name, or pass --overwrite to replace it.")


def _template() -> Any:
    try:
        jinja2 = importlib.import_module("jinja2")
    except ImportError:
        raise InputError(
            "A report is written with jinja2, which is not installed: pip install 'lowrank_compress[report]'."
        ) from None
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"share": share, "size": size, "figure": figure, "whole": whole, "change": change}
    return environment.get_template("report.html.j2")


def contents(runs: Sequence[RunFacts]) -> dict[str, Any]:
    """Make what the template shows; charts are drawn here."""
    safe = importlib.import_module("markupsafe").Markup
    metrics = list(dict.fromkeys((row["metric"], row["name"], row["amount"]) for run in runs for row in run.measured))
    return {
        "runs": [
            {
                "facts": run,
                "id": f"run-{number}",
                "heat": heat(run),
                "bits": bits(run),
                "experts": experts(run.report.get("experts", {})),
                "spectra": safe(charts.spectra(found)) if (found := by_kind(run)) else None,
                "to_the_cut": all(len(each.values) == each.cut for kind in found.values() for each in kind),
                "losses": safe(charts.losses(run.predicted, measured, run.unit))
                if run.predicted or run.blocks
                else None,
                "formats": Counter(matrix.format for matrix in run.matrices).most_common(),
                "costs": costs(run),
            }
            for number, run in enumerate(runs, 1)
            for measured in [[(block.increase, block.divergence) for block in run.blocks]]
        ],
        "metrics": metrics,
        "rows": [{"facts": run, "id": f"run-{number}", "values": values(run)} for number, run in enumerate(runs, 1)],
        "trades": [safe(drawn) for drawn in trades(runs, metrics)] if len(runs) > 1 else [],
        "caches": len({run.size.kv_bytes_per_token for run in runs}) > 1,
        "title": runs[0].name if len(runs) == 1 else f"{len(runs)} runs",
    }


def values(run: RunFacts) -> dict[tuple[str, str, str], Mapping[str, Any]]:
    """Look up what was measured of a run: metric, name, amount -> values."""
    return {(row["metric"], row["name"], row["amount"]): row for row in run.measured}


def heat(run: RunFacts) -> dict[str, Any] | None:
    """Arrange kept shares as blocks × kinds of matrices, without those of single experts; None where all are."""
    matrices = [matrix for matrix in run.matrices if matrix.kind == collective(matrix.kind)]
    names = shortened(matrix.kind for matrix in matrices)
    cells = [
        Cell(
            matrix.block,
            names[matrix.kind],
            min(matrix.kept, 1.0),
            f"{100 * matrix.kept:.0f} %",
            "dense" if matrix.rank is None else str(matrix.rank),
            f"{matrix.name} ({matrix.format})",
        )
        for matrix in matrices
    ]
    return grid(cells) if cells else None


def bits(run: RunFacts) -> dict[str, Any] | None:
    """Arrange the bits of quantized layers as blocks × kinds of layers; None where none is quantized."""
    layers = {place_of(name): layer for name, layer in run.report.get("quantize", {}).get("layers", {}).items()}
    names = shortened(kind for _, kind in layers)
    cells = []
    for (block, kind), layer in layers.items():
        said = "as it was" if layer["bits"] is None else f"{layer['bits']}"
        full = 1.0 if layer["bits"] is None else layer["bits"] / 16
        cells.append(Cell(block, names[kind], full, said, size(layer["bytes"]), kind))
    return grid(cells) if cells else None


def by_kind(run: RunFacts) -> dict[str, list[charts.Spectrum]]:
    """Gather the spectra of each kind of matrix, block by block, each with its cut; all experts are of one kind."""
    found: dict[str, list[charts.Spectrum]] = {}
    names = shortened(collective(matrix.kind) for matrix in run.matrices)
    for matrix in run.matrices:
        squares = run.spectra.get(matrix.name)
        if squares and max(squares) > 0:
            shares = [value / max(squares) for value in squares]
            found.setdefault(names[collective(matrix.kind)], []).append(charts.Spectrum(shares, matrix.rank))
    return found


def labels(runs: Sequence[RunFacts]) -> list[str]:
    """Name the way in which each run was made: by its method, and options in which runs of one ratio differ.

    Defaults that follow from the ratio tell no ways apart.
    """
    telling: dict[str, set[str]] = {}
    for one, other in itertools.combinations(runs, 2):
        method = one.report["method"]
        if other.report["method"] == method and other.options["ratio"] == one.options["ratio"]:
            found = {name for name, value in one.options.items() if other.options.get(name) != value}
            telling.setdefault(method, set()).update(found - UNSEEN)
    labelled = []
    for run in runs:
        names = telling.get(run.report["method"], set())
        own = [f"{name}={value}" for name, value in run.options.items() if name in names and value is not None]
        later = [stage for stage in run.chain if stage not in ("factorize", "refine")]
        labelled.append(" ".join([run.report["method"], *own, *later]))
    return labelled


def trades(runs: Sequence[RunFacts], metrics: Sequence[tuple[str, str, str]]) -> list[str]:
    """Draw size against each measure that at least two runs have."""
    drawn = []
    for metric, name, amount in metrics:
        points, dense = list[charts.Point](), set[tuple[float, float]]()
        for run, label in zip(runs, labels(runs), strict=True):
            row = values(run).get((metric, name, amount))
            if row is None:
                continue
            points.append(charts.Point(label, run.name, run.size.bytes / 1e6, row["compressed"]))
            if run.dense_size is not None and isinstance(row.get("dense"), int | float):
                dense.add((run.dense_size.bytes / 1e6, row["dense"]))
        if len(points) > 1 and len(drawn) < MOST_TRADES:
            better = metric in SMALLER_IS_BETTER
            drawn.append(charts.trade(points, sorted(dense), f"{metric} · {name}", less_is_better=better))
    return drawn


def costs(run: RunFacts) -> list[dict[str, Any]]:
    """List what each command took: its steps, with their seconds and their share of the longest, and memory."""
    taken = {
        command: {step: spent for step, spent in cost["seconds"].items() if spent >= SHORTEST}
        for command, cost in (run.cost or {}).items()
        if command in ("compress", *(STAGES[stage].command for stage in run.chain))
    }
    longest = max((spent for steps in taken.values() for spent in steps.values()), default=1.0)
    return [
        {
            "command": command,
            "steps": [(step, spent, spent / longest) for step, spent in steps.items()],
            "total": sum(steps.values()),
            **{name: value for name, value in (run.cost or {})[command].items() if name != "seconds"},
        }
        for command, steps in taken.items()
        if steps
    ]


def share(value: float) -> str:
    """Write a share in per cent."""
    return f"{value:.2%}".replace("%", " %").replace("-", "−")


def size(count: float) -> str:
    """Write bytes as people do."""
    for unit, step in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= step:
            return f"{count / step:.4g} {unit}"
    return f"{count:.0f} bytes"


def figure(value: Any) -> str:
    """Write a measure with four significant digits."""
    return f"{value:.4g}" if isinstance(value, int | float) and not isinstance(value, bool) else "–"


def change(row: Mapping[str, Any]) -> str:
    """Say how far the compressed model's measure is from the dense one's: by a factor, or a difference."""
    ours, dense = row.get("compressed"), row.get("dense")
    if not isinstance(ours, int | float) or not isinstance(dense, int | float):
        return "–"
    if row["metric"] in SMALLER_IS_BETTER and dense:
        return f"× {ours / dense:.4g}"
    return f"{ours - dense:+.3g}".replace("-", "−")


def whole(value: Any) -> str:
    """Write a whole number with separators."""
    return f"{value:,}" if isinstance(value, int) else "–"
