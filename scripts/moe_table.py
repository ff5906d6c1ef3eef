"""Measure the tables of methods for experts, on models that ``train_moe_model.py`` has made, in markdown.

Nothing but the experts is compressed, at shares of *their* parameters, and all methods see the same text. What was
measured is kept beside the model, and not measured again, so that a table which was broken off is taken up.

Usage, from the root of the repository::

    python scripts/moe_table.py runs/balanced                                                      # print
    python scripts/moe_table.py runs/balanced --name experts-balanced --write docs/results.md      # or write there

The table stands between ``<!-- methods:experts-balanced -->`` and ``<!-- /methods:experts-balanced -->``.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from running import lrc, perplexity, write_between

from lowrank_compress.demo.text import part
from lowrank_compress.model.blueprint import blueprint
from lowrank_compress.model.checkpoint import Checkpoint

SEQ_LEN = 256
CHARACTERS = 30_000
"""Of the held-out text that is measured on."""
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
    Row("merge", ("--method", "merge", "--option", "align=true"), ", hidden units aligned"),
    Row("merge", ("--method", "merge")),
    Row("reap-sum", ("--method", "reap-sum")),
    Row("reap", ("--method", "reap")),
    Row("frequency", ("--method", "frequency")),
)


def share_of_experts(model: Path) -> float:
    """Return which share of the parameters inside the blocks experts have."""
    targets = blueprint(Checkpoint(model)).resolved.targets
    return sum(t.elements for t in targets if t.expert is not None) / sum(t.elements for t in targets)


class Measured:
    """Perplexities of one model, kept in a file beside it."""

    def __init__(self, model: Path, samples: int, directory: Path) -> None:
        self.model, self.samples, self.directory = model, samples, directory
        self.file = model.with_name(f"{model.name}-{samples}.json")
        self.calibration, self.heldout = directory / "calibration.txt", directory / "heldout.txt"
        self.calibration.write_text(part("calibration"), encoding="utf-8")
        self.heldout.write_text(part("heldout")[:CHARACTERS], encoding="utf-8")

    def of(self, row: Row | None, ratio: float = 0.0) -> float:
        """Return the perplexity of the model, compressed by a row's method if there is one."""
        key = "dense" if row is None else f"{row.title} {row.options} {ratio:.6f}"
        found = self._kept().get(key)
        if found is None:
            found = perplexity(self._made(row, ratio), self.heldout, "--seq-len", SEQ_LEN)
            self.file.write_text(json.dumps({**self._kept(), key: found}, indent=1) + "\n", encoding="utf-8")
            typer.echo(f"{key}: {found:.3f}", err=True)
        return found

    def _kept(self) -> dict[str, float]:
        return json.loads(self.file.read_text(encoding="utf-8")) if self.file.exists() else {}

    def _made(self, row: Row | None, ratio: float) -> Path:
        if row is None:
            return self.model
        run = Path(tempfile.mkdtemp(dir=self.directory)) / "run"
        others = ("--attention", "dense", "--experts", row.method, *row.options, "--ratio", f"{ratio:.6f}")
        text = ("--calibration", self.calibration, "--samples", self.samples, "--seq-len", SEQ_LEN)
        lrc("compress", self.model, *others, *text, "--out", run)
        return run / "model"


def measure(model: Path, shares: list[float], samples: int, rows: Sequence[Row], directory: Path) -> str:
    """Compress by methods at every share of the experts' parameters, and return the table in markdown."""
    measured, whole = Measured(model, samples, directory), share_of_experts(model)
    dense = measured.of(None)
    info = json.loads((model / "training_info.json").read_text(encoding="utf-8"))
    least, most = (of(share for block in info["shares"] for share in block) for of in (min, max))
    lines = [
        f"Perplexity of a small Mixtral (`scripts/train_moe_model.py`, weight of the balance {info['balance']}: its "
        f"experts see {least:.0%} to {most:.0%} of the tokens), held-out Python documentation; {samples} × {SEQ_LEN} "
        f"calibration tokens; shares of the experts' parameters, which are {whole:.0%} of the blocks; perplexity of "
        f"the dense model: {dense:.2f}.",
        "",
        "| method | " + " | ".join(f"{share:.0%} removed" for share in shares) + " |",
        "|---|" + "---:|" * len(shares),
    ]
    for row in rows:
        values = [measured.of(row, share * whole - SLACK) for share in shares]
        lines.append(f"| {row.title} | {' | '.join(f'{value:.2f}' for value in values)} |")
    return "\n".join(lines)


def main(
    model: Annotated[Path, typer.Argument(help="A small mixture of experts.")],
    write: Annotated[Path | None, typer.Option(help="Markdown file with the markers to write between.")] = None,
    name: Annotated[str, typer.Option(help="Of the table, behind 'methods:' in its markers.")] = "experts",
    only: Annotated[str, typer.Option(help="Methods to measure, separated by commas; nothing for all.")] = "",
    shares: Annotated[str, typer.Option(help="Shares to remove, separated by commas.")] = "0.25,0.5,0.7",
    samples: Annotated[int, typer.Option(help="Windows of the calibration set.")] = 64,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
) -> None:
    """Measure, then print the table or write it into a file."""
    torch.set_num_threads(threads)
    rows = [row for row in ROWS if not only or row.method in only.split(",")]
    with tempfile.TemporaryDirectory() as temporary:
        content = measure(model, [float(share) for share in shares.split(",")], samples, rows, Path(temporary))
    if write is None:
        typer.echo(content)
    else:
        write_between(write, f"methods:{name}", content)


if __name__ == "__main__":
    typer.run(main)
