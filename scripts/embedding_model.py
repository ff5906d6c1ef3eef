"""Compress a real embedding model; print how near its embeddings stay to the dense ones, its size and its speed.

Calibrated on the first half of a text of WikiText-2, recovered on sentences of that, of books and of film reviews;
measured on other sentences of each, in bytes of all weights, and in sentences of 32 tokens a second, 32 at once, on one
thread. What is in --out is not made again, so that what was stopped goes on.

Usage, from the root of the repository (an hour on one core)::

    python scripts/embedding_model.py DIRECTORY/all-minilm-l6-v2 --out runs/minilm
    python scripts/embedding_model.py DIRECTORY/all-minilm-l6-v2 --out runs/minilm --write docs/results.md
"""

from __future__ import annotations

import csv
import random
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from running import ASSETS, lrc, write_between

TEXT = ASSETS / "text"
TOKENS, AT_ONCE = 32, 32
DENSE, RECOVERED = "dense", "recover"


@dataclass(frozen=True)
class Texts:
    """Sentences of one kind to train on, and others to measure on."""

    name: str
    trained: list[str]
    heldout: list[str]


def sentences(text: str) -> list[str]:
    """Split a text where sentences end; of 4 to 60 words each."""
    found = re.split(r"(?<=[.!?]) ", re.sub(r"\s+", " ", text))
    return [sentence.strip() for sentence in found if 4 <= len(sentence.split()) <= 60]


def halves() -> tuple[str, str]:
    """Split the text of WikiText-2."""
    wiki = (TEXT / "wikitext2-valid.txt").read_text(encoding="utf-8")
    return wiki[: len(wiki) // 2], wiki[len(wiki) // 2 :]


def texts(count: int, measured: int) -> list[Texts]:
    """Draw sentences of all kinds; none that is measured on is trained on."""
    first, second = halves()
    both = {
        "WikiText-2": (sentences(first), sentences(second)),
        "books": tuple(sentences((TEXT / f"books-{part}.txt").read_text()) for part in ("train-part", "validation")),
        "SST-2": tuple(_column(TEXT / f"sst2-{part}.tsv") for part in ("train-4k", "dev")),
    }
    draw = random.Random(0)
    found = []
    for name, (first, second) in both.items():
        known = set(first)
        others = [each for each in dict.fromkeys(second) if each not in known]
        first = list(dict.fromkeys(first))
        found.append(
            Texts(name, draw.sample(first, min(count, len(first))), draw.sample(others, min(measured, len(others))))
        )
    return found


def _column(path: Path) -> list[str]:
    with path.open(encoding="utf-8", newline="") as file:
        return [row["sentence"].strip() for row in csv.DictReader(file, delimiter="\t")]


def pairs(path: Path, held: list[str]) -> Path:
    """Write sentences as a table of pairs, scored by the words that they share: only the sentences are of use here."""
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["sentence1", "sentence2", "score"])
        for place in range(0, len(held) - 1, 2):
            one, other = held[place : place + 2]
            table.writerow([one, other, len(set(one.split()) & set(other.split()))])
    return path


def made(model: Path, out: Path, calibration: Path, method: str, ratio: float) -> Path:
    """Compress, unless it is done; the checkpoint."""
    run = out / f"{method}-{ratio:g}"
    lrc("compress", model, "--method", method, "--ratio", ratio, "--calibration", calibration, "--out", run)
    return run / "model"


def speeds(model: Path, checkpoints: Iterable[Path], rounds: int) -> dict[Path, float]:
    """Sentences a second of the dense model and of others, all measured in turn."""
    shape = ("--batch-size", AT_ONCE, "--prompt-tokens", TOKENS, "--rounds", rounds, "--threads", 1)
    found = lrc("bench", *checkpoints, "--against", model, *shape)
    (measurement,) = found["measurements"]
    return {
        Path(found["models"][name]["path"]).resolve(): values["forward"]["tokens_per_second"] / TOKENS
        for name, values in measurement["models"].items()
    }


def row(
    shown: str, removed: str, model: Path, checkpoint: Path, tables: Iterable[Path], speed: float, empty: int = 0
) -> str:
    """A line of the table: cosines, or so many empty cells, bytes, speed."""
    cells = [""] * empty
    for table in tables:
        found: dict[str, Any] = lrc("compare", model, checkpoint, "--sts", table)["sts"][str(table)]
        cells.append(f"{found['cosine']['value']:.4f}")
    stored = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors")) / 1e6
    return f"| {shown} | {removed} | {' | '.join(cells)} | {stored:.1f} MB | {speed:.0f} |"


def main(
    model: Annotated[Path, typer.Argument(help="Directory of the model.")],
    out: Annotated[Path, typer.Option(help="Directory of texts and runs, which are kept.")],
    methods: Annotated[str, typer.Option(help="Separated by commas.")] = "svd-llm,auto",
    ratios: Annotated[str, typer.Option(help="Separated by commas.")] = "0.2,0.3",
    trained: Annotated[int, typer.Option(help="Sentences to train on, of each kind.")] = 8000,
    measured: Annotated[int, typer.Option(help="Sentences to measure on, of each kind.")] = 200,
    steps: Annotated[int, typer.Option(help="Of `lrc recover`, after the last of the methods; 0 for none.")] = 1000,
    batch: Annotated[int, typer.Option(help="Sentences a step.")] = 32,
    lr: Annotated[float, typer.Option(help="Of `lrc recover`.")] = 1e-4,
    rounds: Annotated[int, typer.Option(help="Of measuring speed.")] = 5,
    write: Annotated[Path | None, typer.Option(help="File whose table is replaced.")] = None,
) -> None:
    """Print the table."""
    out.mkdir(parents=True, exist_ok=True)
    kinds = texts(trained, measured)
    calibration, lessons = out / "calibration.txt", out / "sentences.txt"
    calibration.write_text(halves()[0], encoding="utf-8")
    lessons.write_text("\n".join(line for kind in kinds for line in kind.trained) + "\n", encoding="utf-8")
    tables = [pairs(out / f"{kind.name}.csv", kind.heldout) for kind in kinds]
    checkpoints: list[tuple[str, float, Path]] = []
    for ratio in map(float, ratios.split(",")):
        for method in methods.split(","):
            checkpoints.append((f"`{method}`", ratio, made(model, out, calibration, method, ratio)))
        if steps:
            shown, _, checkpoint = checkpoints[-1]
            how = ("--calibration", lessons, "--seq-len", 64, "--steps", steps, "--batch", batch, "--lr", lr)
            lrc("recover", checkpoint.parent, *how)
            checkpoints.append(
                (f"{shown}, {steps * batch:,} sentences of recover", ratio, checkpoint.parent / RECOVERED)
            )
    fast = speeds(model, [checkpoint for _, _, checkpoint in checkpoints], rounds)
    lines = [
        f"| | removed | {' | '.join(kind.name for kind in kinds)} | weights | sentences/s |",
        f"|---|---:|{'---:|' * len(kinds)}---:|---:|",
        row(DENSE, "", model, model, [], fast[model.resolve()], len(tables)),
    ]
    for shown, ratio, checkpoint in checkpoints:
        lines.append(row(shown, f"{ratio:.0%}", model, checkpoint, tables, fast[checkpoint.resolve()]))
    table = "\n".join(lines)
    typer.echo(table)
    if write is not None:
        write_between(write, "embeddings:real", table)


if __name__ == "__main__":
    typer.run(main)
