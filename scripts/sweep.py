"""Hold `auto` against every linear method × allocator × storage, at several ratios, on one model.

The combinations are a sweep, as `lrc sweep` makes it: statistics are taken once for each method, and decompositions are
shared. What is finished in --directory is not made again. Usage, from the root of the repository::

    python scripts/sweep.py --out runs/sweep.json
    python scripts/sweep.py --model MODEL --calibration MINE.txt --perplexity OTHER.txt --ratios 0.3
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from running import ASSETS

from lowrank_compress import sweep
from lowrank_compress.allocation.table import ALLOCATORS
from lowrank_compress.cli.terminal import TerminalReporter
from lowrank_compress.formats.table import FORMATS
from lowrank_compress.methods.linear import LinearMethod
from lowrank_compress.methods.table import METHODS

RECOMMENDED = "auto"
LINEAR = [name for name, method in METHODS.items() if isinstance(method, LinearMethod)]


def combinations(methods: Sequence[str]) -> Iterator[dict[str, str]]:
    """All rows of the grid but the recommendation, which is taken as it is."""
    for method in methods:
        for allocator, entry in ALLOCATORS.items():
            if entry.needs_influence and method == "svd":
                continue  # it takes no data
            yield from ({"method": method, "allocate": allocator, "storage": storage} for storage in FORMATS)


def verdict(rows: Sequence[dict[str, Any]], ratio: float) -> dict[str, Any]:
    """The recommendation against the best of all the others at a ratio."""
    at_ratio = [row for row in rows if row["ratio"] == ratio]
    (own,) = [row for row in at_ratio if row["label"] == RECOMMENDED]
    others = sorted((row for row in at_ratio if row is not own), key=lambda row: row["perplexity"])
    return {
        "ratio": ratio,
        "auto": own["perplexity"],
        "auto_is_best": own["perplexity"] <= others[0]["perplexity"],
        "best": others[:5],
    }


def show(rows: Sequence[dict[str, Any]], verdicts: Sequence[dict[str, Any]], dense: float, title: str) -> None:
    """Print every combination, a column a ratio, and what it says about the recommendation."""
    console = Console(highlight=False)
    console = console if console.is_terminal else Console(highlight=False, width=140)
    console.print(f"{title}; dense: {dense:.4f}")
    table = Table("combination", *(f"at {found['ratio']:.0%}" for found in verdicts), header_style="bold")
    least = {found["ratio"]: min(found["auto"], found["best"][0]["perplexity"]) for found in verdicts}
    for label in dict.fromkeys(row["label"] for row in rows):
        values = {row["ratio"]: row["perplexity"] for row in rows if row["label"] == label}
        cells = [f"[bold]{x:.4f} *[/]" if x == least[ratio] else f"{x:.4f}" for ratio, x in values.items()]
        table.add_row(label, *cells)
    console.print(table)
    for found in verdicts:
        best = found["best"][0]
        excess = found["auto"] / best["perplexity"] - 1
        outcome = "at least as good as" if found["auto_is_best"] else f"{excess:.2%} worse than"
        console.print(
            f"At {found['ratio']:.0%}: auto ({found['auto']:.4f}) is {outcome} the best combination, {best['label']} "
            f"({best['perplexity']:.4f})."
        )


def main(
    model: Annotated[Path, typer.Option(help="Checkpoint.")] = ASSETS / "models" / "stories260k-llama-gqa",
    calibration: Annotated[Path, typer.Option(help="Calibration text.")] = ASSETS
    / "text"
    / "tinystories-calibration.txt",
    text: Annotated[Path, typer.Option("--perplexity", help="Text to measure on.")] = ASSETS
    / "text"
    / "tinystories-dev.txt",
    ratios: Annotated[str, typer.Option(help="Ratios, separated by commas.")] = "0.1,0.2,0.3",
    samples: Annotated[int, typer.Option(help="Calibration windows.")] = 128,
    seq_len: Annotated[int, typer.Option(help="Tokens a window.")] = 256,
    methods: Annotated[
        str | None, typer.Option(help="Methods, separated by commas. [default: all linear ones]")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file for the result.")] = None,
    directory: Annotated[Path | None, typer.Option(help="Keep the runs here. [default: a temporary one]")] = None,
) -> None:
    """Print the table, write it as JSON, and exit with 1 if the recommendation is not the best at every ratio."""
    names = [name for name in methods.split(",") if name] if methods else LINEAR
    config = {
        "model": str(model),
        "methods": [*combinations([name for name in names if name != RECOMMENDED]), RECOMMENDED],
        "ratios": [float(ratio) for ratio in ratios.split(",")],
        "calibrations": [str(calibration)],
        "options": {"samples": samples, "seq_len": seq_len},
        "evaluate": {"perplexity": str(text), "seq_len": seq_len},
    }
    with tempfile.TemporaryDirectory() as temporary, TerminalReporter() as reporter:
        found = sweep(config, directory or temporary, reporter=reporter)["rows"]
    failed = [row for row in found if row["state"] == "failed"]
    for row in failed:
        typer.echo(f"{row['name']}: {row['problem']}", err=True)
    rows = []
    for row in found:
        if row["state"] == "finished":
            (values,) = row["measured"]["perplexity"].values()
            kept = {name: row[name] for name in ("label", "ratio", "asked_ratio", "reached_ratio")}
            rows.append({**kept, "perplexity": values["compressed"], "dense": values["dense"]})
    verdicts = [verdict(rows, ratio) for ratio in config["ratios"]]
    if out is not None:
        setting = config | {
            "model": model.name,
            "calibrations": [calibration.name],
            "evaluate": {"perplexity": text.name},
        }
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({"setting": setting, "rows": rows, "verdicts": verdicts}, indent=2) + "\n", "utf-8")
    show(rows, verdicts, rows[0]["dense"], f"{model.name}: perplexity on {text.name}")
    if failed or not all(found["auto_is_best"] for found in verdicts):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
