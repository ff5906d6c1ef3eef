"""Measure what each idea of `auto` gains: second allocation, refining, recovery; model × ratio, over several seeds.

Each cell is perplexity ÷ the dense model's: the mean over seeds, and half of the distance between the extremes. Seeds
shuffle the calibration text. Usage, from the root of the repository (a minute a cell)::

    python scripts/ablation.py
    python scripts/ablation.py --only demo --ratios 0.3 --seeds 0 --steps 0     # without recovery
    python scripts/ablation.py --json runs/ablation.json --write docs/results.md

With --json what is measured is kept there, and not measured again; with --write the table goes between
``<!-- methods:ablation -->`` and ``<!-- /methods:ablation -->``.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import torch
import typer
from methods_table import Case, cases
from running import lrc, perplexity, write_between

IDEAS = ("one allocation", "… refined", "second allocation", "… refined", "… and recovered")


@dataclass
class Known:
    """What has been measured, kept in a file if there is one."""

    file: Path | None
    values: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.file is not None and self.file.exists():
            self.values = json.loads(self.file.read_text(encoding="utf-8"))

    def add(self, key: str, value: float) -> None:
        """Keep one value."""
        self.values[key] = value
        typer.echo(f"{key}: {value:.4f}", err=True)
        if self.file is not None:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.file.write_text(json.dumps(self.values, indent=0) + "\n", encoding="utf-8")


def key_of(case: Case, ratio: float, seed: int, idea: int) -> str:
    """Name a cell's value at one seed."""
    return f"{case.name} {ratio:g} seed {seed}: {idea}"


def measure(case: Case, ratios: Sequence[float], seed: int, steps: int, known: Known, directory: Path) -> None:
    """Measure all ideas at every ratio, with one calibration."""
    run, length = directory / f"{case.name}-{seed}", ["--seq-len", case.seq_len]
    data = ["--calibration", case.calibration, "--samples", case.samples, "--seed", seed, *length]
    if f"{case.name} dense" not in known.values:
        known.add(f"{case.name} dense", perplexity(case.model, case.text, *length))

    def cell(ratio: float, idea: int, checkpoint: Path, make: Callable[[], object] | None = None) -> None:
        if (key := key_of(case, ratio, seed, idea)) not in known.values:
            if make is not None:
                make()
            known.add(key, perplexity(checkpoint, case.text, *length))

    for ratio in ratios:
        wanted = [idea for idea in range(len(IDEAS)) if steps or idea < 4]
        if all(key_of(case, ratio, seed, idea) in known.values for idea in wanted):
            continue
        if not run.exists():
            lrc("calibrate", case.model, "--method", "auto", *data, "--out", run)
        for first, flag in ((0, "--no-second"), (2, "--second")):
            lrc("score", run, "--ratio", ratio, flag, "--overwrite")
            lrc("factorize", run, "--refine", "--overwrite")
            cell(ratio, first, run / "unrefined")
            cell(ratio, first + 1, run / "model")
        if steps:
            out = directory / f"{case.name}-{seed}-{ratio:g}-recovered"
            cell(ratio, 4, out, lambda out=out: lrc("recover", run, "--steps", steps, "--out", out))


def table(measured: Sequence[Case], ratios: Sequence[float], seeds: Sequence[int], steps: int, known: Known) -> str:
    """Return the table in markdown."""
    spread = f", mean over {len(seeds)} calibration sets ± half their distance" if len(seeds) > 1 else ""
    lines = [
        f"Perplexity ÷ the dense model's{spread} (seed{'s' if spread else ''} {', '.join(map(str, seeds))})"
        + (f"; recovered in {steps} steps." if steps else "."),
        "",
        "| model | idea | " + " | ".join(f"{ratio:.0%} removed" for ratio in ratios) + " |",
        "|---|---|" + "---:|" * len(ratios),
    ]
    for case in measured:
        dense = known.values[f"{case.name} dense"]
        for idea, title in enumerate(IDEAS[: None if steps else -1]):
            cells = []
            for ratio in ratios:
                keys = [key_of(case, ratio, seed, idea) for seed in seeds]
                found = [known.values[key] / dense for key in keys if key in known.values]
                half = f" ± {(max(found) - min(found)) / 2:.3f}" if len(found) > 1 else ""
                cells.append(f"{sum(found) / len(found):.3f}{half}" if found else "–")
            lines.append(f"| {case.name} | {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(
    only: Annotated[str | None, typer.Option(help="Models, separated by commas. [default: stories260k,demo]")] = None,
    ratios: Annotated[str, typer.Option(help="Separated by commas.")] = "0.2,0.3,0.4",
    seeds: Annotated[str, typer.Option(help="Separated by commas.")] = "0,1",
    steps: Annotated[int, typer.Option(help="Of recovery; 0 for none.")] = 150,
    json_file: Annotated[Path | None, typer.Option("--json", help="File that keeps what was measured.")] = None,
    write: Annotated[Path | None, typer.Option(help="Markdown file with the markers to write between.")] = None,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
) -> None:
    """Measure what is not known yet, and print the table or write it into a file."""
    torch.set_num_threads(threads)
    known, asked = Known(json_file), (only or "stories260k,demo").split(",")
    numbers, draws = [float(ratio) for ratio in ratios.split(",")], [int(seed) for seed in seeds.split(",")]
    with tempfile.TemporaryDirectory() as temporary:
        there = [case for case in cases(Path(temporary) / "text") if case.name in asked]
        for case in there:
            if not (case.model / "config.json").exists():
                raise typer.BadParameter(f"{case.name} cannot be measured: there is no {case.model}")
            for seed in draws:
                measure(case, numbers, seed, steps, known, Path(temporary))
    content = table(there, numbers, draws, steps, known)
    if write is None:
        typer.echo(content)
    else:
        write_between(write, "methods:ablation", content)


if __name__ == "__main__":
    typer.run(main)
