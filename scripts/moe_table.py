"""Measure the README's table of methods for experts, on a model that ``train_moe_model.py`` has made, in markdown.

Nothing but the experts is compressed, at shares of *their* parameters, and all methods see the same text.

Usage, from the root of the repository::

    python scripts/moe_table.py runs/balanced                       # print
    python scripts/moe_table.py runs/balanced --write README.md     # replace what stands between the markers

The table stands between ``<!-- methods:experts -->`` and ``<!-- /methods:experts -->``.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from running import lrc, perplexity, write_between
from train_moe_model import CHARACTERS

from lowrank_compress.demo.text import part
from lowrank_compress.model.blueprint import blueprint
from lowrank_compress.model.checkpoint import Checkpoint

NAME = "experts"
SEQ_LEN = 256
SLACK = 1e-4
"""Taken off a ratio, so that the list of the experts that a router still knows does not cost another expert."""


@dataclass(frozen=True)
class Row:
    """A method for experts, with options of its own."""

    method: str
    options: tuple[object, ...] = ()
    said: str = ""

    @property
    def title(self) -> str:
        """How the row is called."""
        return f"`--experts {self.method}`{self.said}"


LOSS = ("--allocate", "loss")
ROWS = (
    Row("auto", ("--method", "auto"), ", the recommendation"),
    Row("kfac", ("--method", "kfac", "--storage", "auto", *LOSS), ", one budget by loss"),
    Row("nystrom", ("--method", "nystrom", "--metric", "kfac", *LOSS), ", one budget by loss"),
    Row("nystrom", ("--method", "nystrom", "--metric", "kfac", "--allocate", "uniform"), ", uniform"),
    Row("camera", ("--method", "camera")),
    Row("reap-sum", ("--method", "reap-sum")),
    Row("reap", ("--method", "reap")),
    Row("frequency", ("--method", "frequency")),
)


def share_of_experts(model: Path) -> float:
    """Return which share of the parameters inside the blocks experts have."""
    targets = blueprint(Checkpoint(model)).resolved.targets
    return sum(t.elements for t in targets if t.expert is not None) / sum(t.elements for t in targets)


def measure(model: Path, shares: list[float], samples: int, directory: Path) -> str:
    """Compress by every method at every share of the experts' parameters, and return the table in markdown."""
    calibration, heldout = directory / "calibration.txt", directory / "heldout.txt"
    calibration.write_text(part("calibration"), encoding="utf-8")
    heldout.write_text(part("heldout")[:CHARACTERS], encoding="utf-8")
    length, whole = ("--seq-len", SEQ_LEN), share_of_experts(model)
    dense = perplexity(model, heldout, *length)
    lines = [
        "| method | " + " | ".join(f"{share:.0%} removed" for share in shares) + " |",
        "|---|" + "---:|" * len(shares),
    ]
    for number, row in enumerate(ROWS):
        values = []
        for share in shares:
            run = directory / f"{number}-{share}"
            others = ("--attention", "dense", "--experts", row.method, *row.options)
            data = (
                "--calibration",
                calibration,
                "--samples",
                samples,
                *length,
                "--ratio",
                f"{share * whole - SLACK:.6f}",
            )
            lrc("compress", model, *others, *data, "--out", run)
            values.append(perplexity(run / "model", heldout, *length))
        typer.echo(f"{row.title}: {', '.join(f'{value:.3f}' for value in values)}", err=True)
        lines.append(f"| {row.title} | {' | '.join(f'{value:.2f}' for value in values)} |")
    said = (
        f"Perplexity of a small Mixtral (`scripts/train_moe_model.py`), held-out Python documentation; {samples} × "
        f"{SEQ_LEN} calibration tokens; shares of the experts' parameters, which are {whole:.0%} of the blocks (whole "
        f"experts: as many as that takes in every block); perplexity of the dense model: {dense:.2f}."
    )
    return "\n".join([said, "", *lines])


def main(
    model: Annotated[Path, typer.Argument(help="A small mixture of experts.")],
    write: Annotated[Path | None, typer.Option(help="Markdown file with the markers to write between.")] = None,
    shares: Annotated[str, typer.Option(help="Shares to remove, separated by commas.")] = "0.25,0.5,0.7",
    samples: Annotated[int, typer.Option(help="Windows of the calibration set.")] = 128,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
) -> None:
    """Measure, then print the table or write it into a file."""
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as temporary:
        content = measure(model, [float(share) for share in shares.split(",")], samples, Path(temporary))
    if write is None:
        typer.echo(content)
    else:
        write_between(write, f"methods:{NAME}", content)


if __name__ == "__main__":
    typer.run(main)
