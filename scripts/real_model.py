"""Compress a real language model by `auto` and by named methods; print perplexity in and out of domain, in markdown.

Calibrated on the first half of a text, measured on a part of the second, and on source code of Python's standard
library, which nothing was calibrated on. Each cell is a process of its own, so that its CPU time and memory count.
``excess`` is the share of svd-llm's excess cross-entropy, ln(perplexity / dense), that a method has.

Usage, from the root of the repository (tens of minutes; what --json has is not measured again)::

    python scripts/real_model.py DIRECTORY/qwen2.5-coder-0.5b --json real.json
    python scripts/real_model.py DIRECTORY/qwen2.5-coder-0.5b --json real.json --write docs/results.md
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer
from running import ASSETS, lrc, perplexity, write_between

REFERENCE, DENSE = "svd-llm", "dense"
# Modules of the standard library that change little from one Python to the next.
CODE = ("argparse", "json.decoder", "heapq", "textwrap", "bisect", "queue")
WINDOWS = ("--seq-len", 512, "--limit", 24)


def sources(modules: Iterable[str]) -> str:
    """Read the source code of modules."""
    return "\n".join(Path(__import__(name, fromlist=["_"]).__file__ or "").read_text("utf-8") for name in modules)


def texts(text: Path, directory: Path) -> tuple[Path, Path, Path]:
    """Text to calibrate on, to measure on, and code to measure on, written below a directory."""
    whole = text.read_text(encoding="utf-8")
    parts = {
        "calibration": whole[: len(whole) // 2],
        "heldout": whole[len(whole) // 2 :][:60_000],
        "code": sources(CODE)[:60_000],
    }
    for name, part in parts.items():
        (directory / f"{name}.txt").write_text(part, encoding="utf-8")
    return tuple(directory / f"{name}.txt" for name in parts)  # pyright: ignore[reportReturnType]


def compress(words: list[str]) -> tuple[float, float]:
    """Run `lrc compress` in a process of its own; its CPU seconds and its peak memory in GB."""
    process = subprocess.Popen([sys.executable, "-m", "lowrank_compress", "compress", *words])
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"lrc compress {' '.join(words)} failed")
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1e6


def measured(model: Path, method: str, ratio: float, samples: int, text: Path) -> dict[str, Any]:
    """One cell: perplexity on both texts, CPU seconds, memory. The method ``dense`` leaves the model as it is."""
    with tempfile.TemporaryDirectory() as temporary:
        calibration, heldout, code = texts(text, Path(temporary))
        found: dict[str, Any] = {}
        checkpoint = model
        if method != DENSE:
            run = Path(temporary) / "run"
            words = [model, "--method", method, "--ratio", ratio, "--calibration", calibration, "--samples", samples,
                     "--seq-len", 512, "--out", run]  # fmt: skip
            found["cpu_seconds"], found["gigabytes"] = compress([str(word) for word in words])
            found["plan"] = lrc("show", run).get("plan")
            checkpoint = run / "model"
        found["inside"], found["outside"] = (perplexity(checkpoint, each, *WINDOWS) for each in (heldout, code))
    return found


def table(cells: dict[str, dict[str, Any]], methods: list[str], ratios: list[float]) -> str:
    """All cells in markdown."""
    dense = cells[DENSE]
    lines = [
        "| method | removed | perplexity | excess | on code | CPU time | memory |",
        "|---|---:|---:|---:|---:|---:|---:|",
        f"| dense | | {dense['inside']:.4g} | | {dense['outside']:.4g} | | |",
    ]
    for ratio in ratios:
        reference = cells.get(f"{REFERENCE} {ratio:g}")
        for method in methods:
            if (cell := cells.get(f"{method} {ratio:g}")) is None:
                continue
            excess = [math.log(each["inside"] / dense["inside"]) for each in (cell, reference) if each is not None]
            share = f"{excess[0] / excess[1]:.2f}" if len(excess) > 1 else "–"
            lines.append(
                f"| `{method}` | {ratio:.0%} | {cell['inside']:.4g} | {share} | {cell['outside']:.4g} | "
                f"{cell['cpu_seconds'] / 60:.1f} min | {cell['gigabytes']:.1f} GB |"
            )
    return "\n".join(lines)


def main(
    model: Annotated[Path, typer.Argument(help="Directory of the model.")],
    methods: Annotated[str, typer.Option(help="Separated by commas.")] = "svd-llm,modegpt,auto",
    ratios: Annotated[str, typer.Option(help="Separated by commas.")] = "0.2,0.3",
    samples: Annotated[int, typer.Option(help="Windows of 512 tokens to calibrate on.")] = 24,
    text: Annotated[Path, typer.Option(help="Text to calibrate and to measure on.")] = ASSETS
    / "text"
    / "wikitext2-valid.txt",
    json_: Annotated[Path | None, typer.Option("--json", help="Keeps what was measured.")] = None,
    write: Annotated[Path | None, typer.Option(help="File whose table is replaced.")] = None,
) -> None:
    """Print the table."""
    cells = json.loads(json_.read_text()) if json_ is not None and json_.exists() else {}
    asked, numbers = methods.split(","), [float(ratio) for ratio in ratios.split(",")]
    if DENSE not in cells:
        cells[DENSE] = measured(model, DENSE, 0, samples, text)
    for ratio in numbers:
        for method in asked:
            if (key := f"{method} {ratio:g}") not in cells:
                cells[key] = measured(model, method, ratio, samples, text)
                if json_ is not None:
                    json_.write_text(json.dumps(cells, indent=1) + "\n")
    made = table(cells, asked, numbers)
    typer.echo(made)
    if write is not None:
        write_between(write, "methods:real", made)


if __name__ == "__main__":
    typer.run(main)
