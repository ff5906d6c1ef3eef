"""Compare every linear method × allocator × storage, at several ratios, on one model; and `auto` with the best.

Each method is calibrated once (`lrc calibrate`); every combination is then `lrc score`, `lrc factorize` and `lrc eval`
on that run. The recommendation is one plain `lrc compress`, so its row also shows whether the two ways agree. The
dense model is evaluated once. Usage, from the root of the repository::

    python scripts/sweep.py --out runs/sweep.json
    python scripts/sweep.py --model MODEL --calibration MINE.txt --perplexity OTHER.txt --ratios 0.3
"""

from __future__ import annotations

import json
import multiprocessing
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from running import ASSETS, lrc, perplexity

from lowrank_compress.allocation.table import ALLOCATORS
from lowrank_compress.formats.table import FORMATS
from lowrank_compress.methods.linear import LinearMethod
from lowrank_compress.methods.table import METHODS

RECOMMENDED = "auto"
LINEAR = [name for name, method in METHODS.items() if isinstance(method, LinearMethod)]


@dataclass(frozen=True)
class Setting:
    """What all combinations share."""

    model: Path
    calibration: Path
    text: Path
    samples: int
    seq_len: int
    ratios: tuple[float, ...]

    def calibrating(self, method: str) -> list[object]:
        """Arguments that say what is calibrated, and on what."""
        data = ["--calibration", self.calibration, "--samples", self.samples, "--seq-len", self.seq_len]
        return [self.model, "--method", method, *data]

    def measure(self, checkpoint: Path) -> float:
        """Perplexity of a checkpoint on the text."""
        return perplexity(checkpoint, self.text, "--seq-len", self.seq_len)


def sweep_method(setting: Setting, method: str, directory: Path, threads: int) -> list[dict[str, Any]]:
    """Measure all combinations of one method; the recommendation is taken as it is."""
    torch.set_num_threads(threads)
    run = directory / method
    rows = []
    if method == RECOMMENDED:
        for ratio in setting.ratios:
            out = directory / f"{method}-{ratio:g}"
            found = lrc("compress", *setting.calibrating(method), "--ratio", ratio, "--out", out)
            rows.append(row(method, "(default)", "(default)", found, setting.measure(out / "model")))
        return rows
    lrc("calibrate", *setting.calibrating(method), "--out", run)
    for ratio in setting.ratios:
        for allocator, entry in ALLOCATORS.items():
            if entry.needs_influence and method == "svd":
                continue  # it takes no data
            for storage in FORMATS:
                ranks = ["--ratio", ratio, "--allocate", allocator, "--storage", storage]
                lrc("score", run, *ranks, "--overwrite")
                found = lrc("factorize", run, "--overwrite")
                rows.append(row(method, allocator, storage, found, setting.measure(run / "model")))
    return rows


def row(method: str, allocator: str, storage: str, found: dict[str, Any], value: float) -> dict[str, Any]:
    """One line of the result."""
    return {
        "method": method,
        "allocate": allocator,
        "storage": storage,
        "asked_ratio": found["asked_ratio"],
        "reached_ratio": found["reached_ratio"],
        "perplexity": value,
    }


def verdict(rows: Sequence[dict[str, Any]], ratio: float) -> dict[str, Any]:
    """The recommendation against the best of all the others at a ratio."""
    at_ratio = [entry for entry in rows if entry["asked_ratio"] == ratio]
    (own,) = [entry for entry in at_ratio if entry["method"] == RECOMMENDED]
    others = sorted((entry for entry in at_ratio if entry is not own), key=lambda entry: entry["perplexity"])
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
    table = Table(header_style="bold")
    for name in ("method", "allocator", "storage"):
        table.add_column(name)
    least = {}
    for found in verdicts:
        table.add_column(f"at {found['ratio']:.0%}", justify="right")
        least[found["ratio"]] = min(found["auto"], found["best"][0]["perplexity"])
    lines: dict[tuple[str, str, str], dict[float, float]] = {}
    for entry in rows:
        key = (entry["method"], entry["allocate"], entry["storage"])
        lines.setdefault(key, {})[entry["asked_ratio"]] = entry["perplexity"]
    for key, values in lines.items():
        cells = [
            f"[bold]{value:.4f} *[/]" if value == least[ratio] else f"{value:.4f}" for ratio, value in values.items()
        ]
        table.add_row(*key, *cells, end_section=key[1:] == (list(ALLOCATORS)[-1], list(FORMATS)[-1]))
    console.print(table)
    for found in verdicts:
        best = found["best"][0]
        name = f"{best['method']} × {best['allocate']} × {best['storage']}"
        excess = found["auto"] / best["perplexity"] - 1
        outcome = "at least as good as" if found["auto_is_best"] else f"{excess:.2%} worse than"
        console.print(
            f"At {found['ratio']:.0%}: auto ({found['auto']:.4f}) is {outcome} the best combination, {name} "
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
    jobs: Annotated[int, typer.Option(help="Methods at once.")] = 1,
    threads: Annotated[int, typer.Option(help="CPU threads a job.")] = 1,
    out: Annotated[Path | None, typer.Option(help="JSON file for the result.")] = None,
    directory: Annotated[Path | None, typer.Option(help="Keep the runs here. [default: a temporary one]")] = None,
) -> None:
    """Print the table, write it as JSON, and exit with 1 if the recommendation is not the best at every ratio."""
    torch.set_num_threads(threads)
    setting = Setting(model, calibration, text, samples, seq_len, tuple(float(ratio) for ratio in ratios.split(",")))
    names = [name for name in methods.split(",") if name] if methods else LINEAR
    names = [*(name for name in names if name != RECOMMENDED), RECOMMENDED]
    with tempfile.TemporaryDirectory() as temporary:
        runs = directory or Path(temporary)
        dense = setting.measure(model)
        rows: list[dict[str, Any]] = []
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(jobs, mp_context=context) as pool:
            futures = [pool.submit(sweep_method, setting, name, runs, threads) for name in names]
            for name, future in zip(names, futures, strict=True):
                rows += future.result()
                typer.echo(f"{name}: done", err=True)
    verdicts = [verdict(rows, ratio) for ratio in setting.ratios]
    if out is not None:
        settings = asdict(setting) | {"model": model.name, "calibration": calibration.name, "text": text.name}
        result = {"setting": settings, "dense": dense, "rows": rows, "verdicts": verdicts}
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    show(rows, verdicts, dense, f"{model.name}: perplexity on {text.name}")
    if not all(found["auto_is_best"] for found in verdicts):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
