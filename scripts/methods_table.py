"""Measure the tables of methods in docs/results.md, each as its paper has it and some as this toolkit can, in markdown.

Each table is a sweep, as `lrc sweep` makes it: statistics and decompositions are computed once for all ratios.

Usage, from the root of the repository::

    python scripts/methods_table.py                        # print
    python scripts/methods_table.py --write docs/results.md      # replace what stands between the markers

A table stands between ``<!-- methods:NAME -->`` and ``<!-- /methods:NAME -->``. A model that is not there is passed
over, with a line on stderr, and its table stays as it was.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from running import ASSETS, write_between

from lowrank_compress import sweep
from lowrank_compress.cli.terminal import TerminalReporter
from lowrank_compress.demo import MODEL_DIRECTORY
from lowrank_compress.demo.text import write_parts
from lowrank_compress.methods.linear import LinearMethod
from lowrank_compress.methods.table import METHODS
from lowrank_compress.stages.reporting import Reporter


@dataclass(frozen=True)
class Row:
    """A method with options of its own."""

    method: str
    metric: str | None = None
    allocate: str | None = None

    @property
    def title(self) -> str:
        """How the row is called."""
        return f"`{self.method} --metric {self.metric}`" if self.metric else f"`{self.method}`"

    @property
    def allocation(self) -> str:
        """How its ranks are chosen."""
        return self.allocate or METHODS[self.method].allocate

    @property
    def entry(self) -> dict[str, str]:
        """The same, as a sweep's file has it."""
        own = {"method": self.method, "metric": self.metric, "allocate": self.allocate}
        return {name: value for name, value in own.items() if value is not None}


NEW = (Row("modegpt"), Row("modegpt", "kfac"), Row("modegpt", "kfac", "loss"), Row("auto"))
ALL = (*(Row(name) for name, method in METHODS.items() if isinstance(method, LinearMethod)), *NEW)


@dataclass(frozen=True)
class Case:
    """A model with the texts to calibrate and to measure it on."""

    name: str
    title: str
    model: Path
    calibration: Path
    text: Path
    samples: int
    rows: tuple[Row, ...]
    seq_len: int = 256


def cases(directory: Path) -> list[Case]:
    """All cases; the demo's texts are written below `directory`."""
    demo = write_parts(directory)
    texts = ASSETS / "text"
    return [
        Case(
            "demo",
            "the model of `lrc demo` (Llama, 0.7 M parameters), held-out Python documentation",
            MODEL_DIRECTORY,
            demo["calibration"],
            demo["heldout"],
            256,
            ALL,
        ),
        Case(
            "stories260k",
            "stories260K (Llama, 0.26 M parameters, grouped-query attention), TinyStories",
            ASSETS / "models" / "stories260k-llama-gqa",
            texts / "tinystories-calibration.txt",
            texts / "tinystories-dev.txt",
            128,
            ALL,
        ),
        Case(
            "books",
            "books-gpt2-2m (GPT-2, 2.3 M parameters), public-domain books",
            ASSETS / "models" / "books-gpt2-2m",
            texts / "books-train-part.txt",
            texts / "books-validation.txt",
            128,
            (Row("svd"), Row("svd-llm"), *NEW),
        ),
    ]


def measure(
    case: Case, ratios: Sequence[float], directory: Path, known: Mapping[str, list[float]], reporter: Reporter
) -> str:
    """Compress by every method at every ratio, and return the table in markdown; rows that are known stay as they are.

    Parameters
    ----------
    known
        Title of a row, with that of its ranks -> its values.

    Raises
    ------
    RuntimeError
        A combination failed.
    """
    there = {row: known.get(f"{row.title} | {row.allocation}", []) for row in case.rows}
    wanted = [row for row, values in there.items() if len(values) != len(ratios)]
    grid = {
        "model": str(case.model),
        "methods": [row.entry for row in wanted],
        "ratios": list(ratios),
        "calibrations": [str(case.calibration)],
        "options": {"samples": case.samples, "seq_len": case.seq_len},
        "evaluate": {"perplexity": str(case.text), "seq_len": case.seq_len},
    }
    found = sweep(grid, directory / case.name, reporter=reporter)["rows"]
    if failed := [f"{each['name']}: {each['problem']}" for each in found if each["state"] == "failed"]:
        raise RuntimeError("; ".join(failed))
    measured = [each["measured"]["perplexity"][str(case.text)] for each in found]
    values = [each["compressed"] for each in measured]
    table = there | {row: values[n * len(ratios) : (n + 1) * len(ratios)] for n, row in enumerate(wanted)}
    lines = [
        "| method | ranks | storage | " + " | ".join(f"{ratio:.0%} removed" for ratio in ratios) + " |",
        "|---|---|---|" + "---:|" * len(ratios),
    ]
    least = [min(column) for column in zip(*table.values(), strict=True)]
    for row, values in table.items():
        cells = [
            f"**{value:.2f}**" if value == best else f"{value:.2f}" for value, best in zip(values, least, strict=True)
        ]
        entry = METHODS[row.method]
        lines.append(f"| {row.title} | {row.allocation} | {entry.storage} | {' | '.join(cells)} |")
    amount = f"{case.samples} × {case.seq_len} calibration tokens; perplexity of the dense model: "
    amount += f"{measured[0]['dense']:.2f}."
    return "\n".join([f"Perplexity of {case.title};", amount, "", *lines])


def rows_of(text: str, name: str, without: str) -> dict[str, list[float]]:
    """Read a table between a pair of markers: the rows of all methods but one, by title and ranks."""
    table = re.search(f"<!-- methods:{name} -->(.*?)<!-- /methods:{name} -->", text, re.DOTALL)
    found = {}
    for line in table[1].splitlines() if table else ():
        title, _, rest = (part.strip() for part in line.strip("| ").partition(" | "))
        if title.startswith("`") and not title.startswith(f"`{without}`"):
            ranks, _, *values = (part.strip(" *") for part in rest.split("|"))
            found[f"{title} | {ranks}"] = [float(value) for value in values]
    return found


def main(
    write: Annotated[Path | None, typer.Option(help="Markdown file with the markers to write between.")] = None,
    ratios: Annotated[str, typer.Option(help="Ratios, separated by commas.")] = "0.1,0.2,0.3",
    only: Annotated[
        str | None, typer.Option(help="One model: demo, stories260k or books. [default: all there are]")
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="Measure this method alone; the other rows stay as --write has them.")
    ] = None,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
) -> None:
    """Measure, then print the tables or write them into a file."""
    torch.set_num_threads(threads)
    numbers = [float(ratio) for ratio in ratios.split(",")]
    with tempfile.TemporaryDirectory() as temporary, TerminalReporter() as reporter:
        for case in cases(Path(temporary) / "text"):
            if only not in (None, case.name):
                continue
            if not (case.model / "config.json").exists():
                typer.echo(f"{case.name} is passed over: there is no {case.model}", err=True)
                continue
            if method is not None and method not in [row.method for row in case.rows]:
                typer.echo(f"{case.name} is passed over: its table has no {method}", err=True)
                continue
            known = {}
            if write is not None and method is not None:
                known = rows_of(write.read_text(encoding="utf-8"), case.name, method)
            content = measure(case, numbers, Path(temporary), known, reporter)
            if write is None:
                typer.echo(f"{content}\n")
            else:
                write_between(write, f"methods:{case.name}", content)


if __name__ == "__main__":
    typer.run(main)
