"""Measure the tables of docs/quantization.md: perplexity by rounding and bits, counted from what is on the disk.

Usage, from the root of the repository::

    python scripts/quantize_table.py                                    # print
    python scripts/quantize_table.py --write docs/quantization.md       # replace what stands between the markers
    python scripts/quantize_table.py --only stories260k-outliers

A table stands between ``<!-- quantize:NAME -->`` and ``<!-- /quantize:NAME -->``. A model that is not there is passed
over, with a line on stderr, and its table stays as it was.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from running import ASSETS, lrc, perplexity, write_between

ROUNDINGS = ("rtn", "gptq", "quantease", "kfac")
BITS = (8, 4, 3)
MIXED = (3.5, 3.25, 2.95, 2.75, 2.6)
RATIOS = (0.05, 0.1)
ROW_WISE = ("--bits", 8, "--group", 0, "--rounding", "rtn", "--activation-bits", 8)
OUTLIERS: tuple[tuple[str, str, tuple[object, ...]], ...] = (
    ("8, scales of rows", "8", ROW_WISE),
    ("LLM.int8(), beyond 6", "8", (*ROW_WISE, "--outliers", 6)),
    ("4", "4", ("--bits", 4, "--activation-bits", 4)),
    ("4, `--smooth`", "4", ("--bits", 4, "--activation-bits", 4, "--smooth")),
    ("SVDQuant: 4, `--smooth`, rank 4", "4", ("--bits", 4, "--activation-bits", 4, "--smooth", "--residual-rank", 4)),
)
"""Weights, activations, and the options that ask for them."""


@dataclass(frozen=True)
class Case:
    """A model with the texts to calibrate and to measure it on."""

    name: str
    title: str
    model: Path
    calibration: Path
    heldout: Path
    windows: int
    bits: tuple[int, ...] = BITS
    mixed: tuple[float, ...] = MIXED
    ratios: tuple[float, ...] = RATIOS

    def sampled(self) -> list[object]:
        """Options that name the calibration set."""
        return ["--calibration", self.calibration, "--samples", self.windows, "--seq-len", 256]

    def measured(self, checkpoint: Path) -> float:
        """Perplexity of a checkpoint."""
        return perplexity(checkpoint, self.heldout, "--seq-len", 256, "--limit", 64)


CASES = (
    Case(
        "stories260k",
        "stories260K (Llama, 0.26 M parameters), TinyStories",
        ASSETS / "models/stories260k-llama-gqa",
        ASSETS / "text/tinystories-calibration.txt",
        ASSETS / "text/tinystories-dev.txt",
        64,
    ),
    Case(
        "books",
        "books-gpt2-2m (GPT-2, 2.3 M parameters), public-domain books",
        ASSETS / "models/books-gpt2-2m",
        ASSETS / "text/books-train-part.txt",
        ASSETS / "text/books-validation.txt",
        16,
        bits=(4, 3),
        mixed=(3.3, 2.75),
        ratios=(0.1,),
    ),
)


def quantized(target: Path, *options: object) -> tuple[dict[str, Any], Path]:
    """Quantize; return what was stored, and where."""
    found = lrc("quantize", target, *options, "--overwrite")
    return found["quantize"], Path(found["model"])


def rows(case: Case, place: Path) -> Iterator[tuple[str, str, dict[str, Any], float]]:
    """Yield rounding, what was asked for, what was stored, and the perplexity of each row."""
    out = ["--out", place / "quantized"]
    for bits in case.bits:
        for rounding in ROUNDINGS:
            said, made = quantized(case.model, "--bits", bits, "--rounding", rounding, *case.sampled(), *out)
            yield f"`{rounding}`", f"{bits} bits", said, case.measured(made)
    for bits in case.mixed:
        said, made = quantized(case.model, "--bits", bits, *case.sampled(), *out)
        yield "`kfac`", f"{bits:g} bits, by loss", said, case.measured(made)
    for ratio in case.ratios:
        run = place / f"run-{ratio:g}"
        lrc("compress", case.model, "--ratio", ratio, *case.sampled(), "--out", run)
        said, made = quantized(run, "--bits", 4)
        yield "`kfac`", f"`auto`, {ratio:.0%} removed, then 4 bits", said, case.measured(made)


def outlier_rows(case: Case, place: Path) -> Iterator[tuple[str, str, dict[str, Any], float]]:
    """Yield the same of `OUTLIERS`."""
    for weights, activations, options in OUTLIERS:
        said, made = quantized(case.model, *options, *case.sampled(), "--out", place / "quantized")
        yield weights, activations, said, case.measured(made)


def table(case: Case, place: Path, head: tuple[str, str], made: Callable[..., Iterator[Any]]) -> str:
    """Make a table of a case, in markdown, of the rows that `made` yields; `head` names their first two columns."""
    dense = case.measured(case.model)
    lines = [
        f"{case.title}; {case.windows} × 256 tokens of calibration, 64 × 256 of held-out text, groups of 64.",
        f"Perplexity of the dense model: {dense:.3f}. Bits are those stored for each weight of the original's blocks.",
        "",
        f"| {head[0]} | {head[1]} | stored bits a weight | perplexity ÷ dense |",
        "|---|---|---:|---:|",
    ]
    original: int | None = None
    for rounding, asked, said, found in made(case, place):
        original = original or said["weights"]
        lines.append(f"| {rounding} | {asked} | {8 * said['stored_bytes'] / original:.2f} | {found / dense:.4f} |")
        typer.echo(lines[-1], err=True)
    return "\n".join(lines)


def main(
    write: Annotated[Path | None, typer.Option(help="The file whose tables are replaced.")] = None,
    only: Annotated[str | None, typer.Option(help="The one table to measure.")] = None,
) -> None:
    """Measure all cases whose models are there."""
    torch.set_num_threads(1)
    tables = [(case.name, case, ("rounding", "asked"), rows) for case in CASES]
    tables.insert(1, (f"{CASES[0].name}-outliers", CASES[0], ("bits of weights", "of activations"), outlier_rows))
    for name, case, head, lines in tables:
        if only not in (None, name):
            continue
        if not case.model.exists():
            typer.echo(f"{case.model} is not there: its table stays as it was.", err=True)
            continue
        with tempfile.TemporaryDirectory() as place:
            made = table(case, Path(place), head, lines)
        typer.echo(f"{made}\n")
        if write is not None:
            write_between(write, f"quantize:{name}", made)


if __name__ == "__main__":
    typer.run(main)
