"""Load a compressed checkpoint in every way that is promised, each in a process of its own, and compare the logits.

With the package imported, without it under ``trust_remote_code=True``, and as an exported dense checkpoint it must give
the same logits; without any of these the load must fail, and say so. Usage, from the root of the repository::

    python scripts/check_loading.py runs/demo/auto-0.3/model
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from lowrank_compress.model.checkpoint import Checkpoint
from lowrank_compress.model.dense import write_dense

# Runs in the child: arguments are how to load, the checkpoint, and where the logits go.
CHILD = """
import sys
way, checkpoint, out = sys.argv[1:]

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "lowrank_compress":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

if way == "package":
    import lowrank_compress
else:
    for name in [name for name in sys.modules if name.partition(".")[0] == "lowrank_compress"]:
        del sys.modules[name]
    sys.meta_path.insert(0, Hidden())

import json
import numpy as np
import torch
import transformers

config = json.load(open(f"{checkpoint}/config.json"))
auto = transformers.AutoModelForCausalLM
if config["architectures"][0].endswith("ForSequenceClassification"):
    auto = transformers.AutoModelForSequenceClassification
model, info = auto.from_pretrained(
    checkpoint, trust_remote_code=way == "remote code", dtype=torch.float32, output_loading_info=True
)
assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
ids = torch.randint(5, config["vocab_size"], (2, 32), generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    np.save(out, model.eval()(input_ids=ids).logits.numpy())
assert way == "package" or "lowrank_compress" not in sys.modules
"""


@dataclass(frozen=True)
class Outcome:
    """What a child did: its logits, or None and the last line of its error."""

    logits: np.ndarray | None
    error: str


def load(way: str, checkpoint: Path, directory: Path) -> Outcome:
    """Load in a fresh, isolated interpreter."""
    out = directory / f"{way.replace(' ', '-')}.npy"
    arguments = [sys.executable, "-I", "-W", "ignore", "-c", CHILD, way, str(checkpoint), str(out)]
    # Remote code is cached here, so that no older copy of it in the user's cache can answer.
    environment = {"HF_HOME": str(directory / "hub"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": ""}
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment, cwd=directory, check=False)
    if done.returncode == 0:
        return Outcome(np.load(out), "")
    return Outcome(None, (done.stderr.strip().splitlines() or ["no message"])[-1])


def main(
    checkpoint: Annotated[Path, typer.Argument(help="A compressed checkpoint: RUN/model.")],
    tolerance: Annotated[float, typer.Option(help="Of the logits, relative to their largest.")] = 1e-4,
) -> None:
    """Print a table, and exit with 1 if an expectation fails."""
    checkpoint = checkpoint.resolve()
    if "quantization_config" not in json.loads((checkpoint / "config.json").read_text(encoding="utf-8")):
        typer.echo(f"{checkpoint} is no compressed checkpoint: its config.json has no quantization_config.", err=True)
        raise typer.Exit(2)
    table = Table("loaded", "expected", "found", "", title=str(checkpoint), title_justify="left")
    failed = False
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        write_dense(Checkpoint(checkpoint), directory / "dense")
        reference = load("package", checkpoint, directory).logits
        for way, path, works in (
            ("package", checkpoint, True),
            ("remote code", checkpoint, True),
            ("neither", checkpoint, False),
            ("neither, exported dense", directory / "dense", True),
        ):
            outcome = load(way, path, directory)
            if outcome.logits is None:
                found, good = f"error: {outcome.error}", not works
            elif reference is None:
                found, good = "loads, but nothing to compare with", False
            else:
                difference = float(np.abs(outcome.logits - reference).max() / np.abs(reference).max())
                found, good = f"logits differ by {difference:.1e}", works and difference <= tolerance
            failed |= not good
            table.add_row(
                way, "the same logits" if works else "an error", found, "ok" if good else "[bold red]FAILED[/]"
            )
    console = Console(highlight=False)
    (console if console.is_terminal else Console(highlight=False, width=160)).print(table)
    if failed:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
