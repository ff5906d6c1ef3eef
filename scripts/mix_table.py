"""Measure what competes for a budget of bytes: bits alone, ranks for equal bits, and both chosen together.

Usage, from the root of the repository::

    python scripts/mix_table.py                                    # print
    python scripts/mix_table.py --write docs/quantization.md       # replace what stands between the markers
    python scripts/mix_table.py --bits 2.75 --rounding quantease --windows 32

A table stands between ``<!-- mixes:NAME -->`` and ``<!-- /mixes:NAME -->``. Divergences are those by which
`lrc compress --bytes` has chosen, in nats from the dense model on text that no fit has seen.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated

import torch
import typer
from running import ASSETS, lrc, perplexity, write_between

NAME, MODEL = "stories260k", ASSETS / "models/stories260k-llama-gqa"
CALIBRATION, HELDOUT = (ASSETS / f"text/tinystories-{part}.txt" for part in ("calibration", "dev"))
MEASURED = ("--seq-len", 256, "--limit", 64)
KINDS = ("quantized", "low-rank", "mixed")


def row(bits: float, rounding: str, windows: int, dense: float, itemsize: int, place: Path) -> str:
    """Measure one budget."""
    run = place / f"{bits:g}"
    text = ("--calibration", CALIBRATION, "--samples", windows, "--seq-len", 256)
    share = bits / (8 * itemsize)
    said = lrc("compress", MODEL, "--bytes", share, "--rounding", rounding, *text, "--out", run)
    scores = json.loads((run / "scores/manifest.json").read_text())["report"]
    found = {
        kind: min((plan["divergence"] for plan in scores["plans"] if plan["plan"].startswith(kind)), default=None)
        for kind in KINDS
    }
    cells = ["–" if value is None else f"{value:.4f}" for value in found.values()]
    stored = 8 * itemsize * said["stored_bytes"] / said["claimed_bytes"]
    reached = perplexity(run / "model", HELDOUT, *MEASURED) / dense
    return f"| {bits:g} | {stored:.2f} | {' | '.join(cells)} | `{scores['plan']}` | {reached:.4f} |"


def main(
    bits: Annotated[list[float] | None, typer.Option(help="Stored bits for each weight of the original.")] = None,
    rounding: Annotated[str, typer.Option(help="How weights are rounded.")] = "kfac",
    windows: Annotated[int, typer.Option(help="Windows of 256 tokens to calibrate on.")] = 64,
    write: Annotated[Path | None, typer.Option(help="The file whose table is replaced.")] = None,
) -> None:
    """Measure all budgets."""
    torch.set_num_threads(1)
    if not MODEL.exists():
        raise SystemExit(f"{MODEL} is not there.")
    itemsize = torch.float32.itemsize
    dense = perplexity(MODEL, HELDOUT, *MEASURED)
    lines = [
        f"stories260K, TinyStories; rounding `{rounding}`, {windows} × 256 tokens of calibration, 64 × 256 of held-out",
        f"text. Perplexity of the dense model: {dense:.3f}. Divergences from it are in nats; – is the plan of a column",
        "to the left.",
        "",
        "| asked bits a weight | stored | quantized | low-rank | mixed | taken | perplexity ÷ dense |",
        "|---:|---:|---:|---:|---:|---|---:|",
    ]
    with tempfile.TemporaryDirectory() as place:
        for each in bits or (3.5, 3.0, 2.75):
            lines.append(row(each, rounding, windows, dense, itemsize, Path(place)))
            typer.echo(lines[-1], err=True)
    typer.echo("\n".join(lines))
    if write is not None:
        write_between(write, f"mixes:{NAME}", "\n".join(lines))


if __name__ == "__main__":
    typer.run(main)
