"""Hold `auto` against every named method at that method's own settings: model × calibration set × ratio.

Perplexity in and out of the calibration's domain. A cell fails where `auto` is worse than the best named method by more
than the tolerance; then the script exits with 1.

Usage, from the root of the repository (some minutes a model; a model that is not there is passed over)::

    python scripts/auto_against_named.py
    python scripts/auto_against_named.py --models demo --ratios 0.3,0.7 --sets 2x64
    python scripts/auto_against_named.py --named named.json    # measure the named methods once, `auto` each time
"""

from __future__ import annotations

import json
import math
import multiprocessing
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from running import ASSETS, lrc

from lowrank_compress.demo import MODEL_DIRECTORY
from lowrank_compress.demo.text import write_parts

RECOMMENDED = "auto"
# Each at its own settings: what its paper has; WeLore is an allocator of plain SVD.
NAMED = {
    name: ("--method", name)
    for name in ("svd", "fwsvd", "asvd", "afm", "svd-llm", "kfac", "nystrom", "cr", "vo-svd", "modegpt")
} | {"welore": ("--method", "svd", "--allocate", "welore")}


@dataclass(frozen=True)
class Model:
    """A model with a text to calibrate on, and texts of its own and of another domain to measure on."""

    path: Path
    calibration: Path
    inside: Path
    outside: Path


CHARACTERS = 400_000  # of each text: more than is used, and little to tokenize


def models(directory: Path) -> dict[str, Model]:
    """All models whose files are there, by name; the beginnings of their texts are written below `directory`."""
    demo, texts, assets = write_parts(directory), ASSETS / "text", ASSETS / "models"
    outside = texts / "wikitext2-valid.txt"
    known = {
        "stories260k": Model(
            assets / "stories260k-llama-gqa",
            texts / "tinystories-calibration.txt",
            texts / "tinystories-dev.txt",
            outside,
        ),
        "demo": Model(MODEL_DIRECTORY, demo["calibration"], demo["heldout"], outside),
        "books": Model(
            assets / "books-gpt2-2m", texts / "books-train-part.txt", texts / "books-validation.txt", outside
        ),
    }
    return {
        name: Model(model.path, *(_beginning(path, directory) for path in (model.calibration, model.inside, outside)))
        for name, model in known.items()
        if (model.path / "config.json").exists() and outside.exists()
    }


def _beginning(path: Path, directory: Path) -> Path:
    short = directory / f"beginning-of-{path.name}"
    short.write_text(path.read_text(encoding="utf-8")[:CHARACTERS], encoding="utf-8")
    return short


@dataclass(frozen=True)
class Cell:
    """One method on one calibration set: perplexity (inside, outside) at each ratio, NaN where that is out of reach."""

    model: Model
    windows: int
    seq_len: int
    method: str
    ratios: tuple[float, ...]
    limit: int

    def measure(self) -> list[tuple[float, float]]:
        """Calibrate once, then compress and evaluate at every ratio."""
        torch.set_num_threads(1)
        options = NAMED.get(self.method, ("--method", self.method))
        found = []
        with tempfile.TemporaryDirectory() as temporary:
            run = Path(temporary) / "run"
            lrc("calibrate", self.model.path, *options[:2], "--calibration", self.model.calibration, "--samples",
                self.windows, "--seq-len", self.seq_len, "--out", run)  # fmt: skip
            for ratio in self.ratios:
                try:
                    lrc("score", run, *options[2:], "--ratio", ratio, "--overwrite")
                    lrc("factorize", run, "--overwrite")
                except RuntimeError as problem:
                    if not any(words in str(problem) for words in ("out of reach", "Ask for", "ask for")):
                        raise
                    found.append((math.nan, math.nan))
                    continue
                texts = (self.model.inside, self.model.outside)
                found.append(tuple(self._perplexity(run / "model", text) for text in texts))
        return found

    def _perplexity(self, checkpoint: Path, text: Path) -> float:
        metrics = lrc("eval", checkpoint, "--perplexity", text, "--seq-len", 256, "--limit", self.limit)
        (values,) = metrics["perplexity"].values()
        return values["compressed"] if "compressed" in values else values["dense"]


def show(title: str, ratios: Sequence[float], rows: Mapping[str, Sequence[Sequence[float]]], tolerance: float) -> int:
    """Print one model and calibration set; return how many cells fail."""
    table, failed = Table("method", title=title), 0
    for ratio in ratios:
        table.add_column(f"{ratio:.0%}", justify="right")
    for name, values in rows.items():
        table.add_row(name, *(f"{inside:.4g} / {outside:.4g}" for inside, outside in values))
    verdict = []
    for number in range(len(ratios)):
        ours = rows[RECOMMENDED][number]
        others = [values[number] for name, values in rows.items() if name != RECOMMENDED]
        cell = []
        for side in range(2):
            reached = [other[side] for other in others if not math.isnan(other[side])]
            if not reached:
                cell.append("–")
                continue
            excess = ours[side] / min(reached)
            fails = not excess <= 1 + tolerance
            failed += fails
            cell.append(f"[red]{excess:.3f}[/]" if fails else f"{excess:.3f}")
        verdict.append(" / ".join(cell))
    table.add_section()
    table.add_row("auto ÷ best named", *verdict)
    Console(width=200).print(table)
    return failed


def _measure(cell: Cell) -> list[tuple[float, float]]:
    return cell.measure()


def main(
    only: Annotated[str, typer.Option("--models", help="Names, separated by commas.")] = "stories260k,demo,books",
    sets: Annotated[str, typer.Option(help="Windows x tokens, separated by commas.")] = "2x64,8x64,32x128",
    ratios: Annotated[str, typer.Option(help="Separated by commas.")] = "0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8",
    methods: Annotated[str, typer.Option(help="Named methods, separated by commas.")] = ",".join(NAMED),
    tolerance: Annotated[float, typer.Option(help="By how much `auto` may be worse.")] = 0.03,
    limit: Annotated[int, typer.Option(help="Windows of 256 tokens to measure on, of each text.")] = 40,
    jobs: Annotated[int, typer.Option(help="Processes.")] = 1,
    named: Annotated[Path | None, typer.Option(help="JSON file that keeps what named methods gave.")] = None,
) -> None:
    """Print a table for each model and calibration set, and exit with 1 if a cell fails."""
    numbers = tuple(float(ratio) for ratio in ratios.split(","))
    known: dict[str, list[float]] = json.loads(named.read_text()) if named is not None and named.exists() else {}
    failed = 0
    with (
        tempfile.TemporaryDirectory() as temporary,
        ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool,
    ):
        there = models(Path(temporary))
        for name in only.split(","):
            if name not in there:
                typer.echo(f"{name} is passed over: its model or texts are not there", err=True)
                continue
            for size in sets.split(","):
                windows, seq_len = map(int, size.split("x"))
                asked, futures = [*methods.split(","), RECOMMENDED], {}
                keys = {
                    (method, ratio): f"{name} {size} {limit} {method} {ratio:g}"
                    for method in asked
                    for ratio in numbers
                }
                for method in asked:
                    left = tuple(ratio for ratio in numbers if keys[method, ratio] not in known)
                    if left:
                        cell = Cell(there[name], windows, seq_len, method, left, limit)
                        futures[method] = (left, pool.submit(_measure, cell))
                values = dict(known)
                for method, (left, future) in futures.items():
                    values |= {keys[method, ratio]: pair for ratio, pair in zip(left, future.result(), strict=True)}
                known |= {key: pair for key, pair in values.items() if f" {RECOMMENDED} " not in key}
                if named is not None:
                    named.write_text(json.dumps(known, indent=0) + "\n")
                rows = {method: [values[keys[method, ratio]] for ratio in numbers] for method in asked}
                failed += show(f"{name}, {windows} × {seq_len} tokens: perplexity inside / outside the domain", numbers,
                               rows, tolerance)  # fmt: skip
    if failed:
        typer.echo(f"{failed} cells are more than {tolerance:.0%} worse than the best named method.", err=True)
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
