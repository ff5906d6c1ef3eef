"""What a model is calibrated on, and what that costs it in its own domain and out of it: perplexity, in markdown.

Each row is a calibration set of as many windows: text of the model's domain, WikiText-2, what the model writes itself,
and mixtures. Measured on other text of the domain, on the other half of WikiText-2, and on source code of Python's
standard library, which is the domain of a model given by its directory. What is lost is ln(perplexity / dense), in nats
a token.

Usage, from the root of the repository (some minutes a small model)::

    python scripts/calibration_texts.py stories --write docs/calibration.md
    python scripts/calibration_texts.py demo --method svd-llm
    python scripts/calibration_texts.py DIRECTORY/qwen2.5-coder-0.5b --method svd-llm --rows 'WikiText-2;self'
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from real_model import sources, texts
from running import ASSETS, ROOT, lrc, perplexity, write_between

from lowrank_compress.demo.text import write_parts

TEXT = ASSETS / "text"
# Modules of the standard library that are not measured on.
CALIBRATED = ("csv", "email.message", "tarfile", "configparser", "difflib", "calendar", "string", "fractions")


def main(
    name: Annotated[str, typer.Argument(help="stories, demo, or the directory of a model of code.")],
    method: Annotated[str, typer.Option(help="Of compression.")] = "auto",
    ratio: Annotated[float, typer.Option(help="Share to remove.")] = 0.2,
    samples: Annotated[int, typer.Option(help="Windows of 256 tokens to calibrate on.")] = 64,
    limit: Annotated[int, typer.Option(help="Windows to measure on.")] = 100,
    rows: Annotated[str, typer.Option(help="Sets to calibrate on, separated by semicolons; all, if empty.")] = "",
    write: Annotated[Path | None, typer.Option(help="File whose table `calibration:DIRECTORY` is replaced.")] = None,
) -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        wiki, elsewhere, code = texts(TEXT / "wikitext2-valid.txt", place)
        if name == "demo":
            model, parts = ROOT / "lowrank_compress" / "demo" / "model", write_parts(place / "parts")
            domain, inside = parts["calibration"], parts["heldout"]
        elif name == "stories":
            model = ASSETS / "models" / "stories260k-llama-gqa"
            domain, inside = TEXT / "tinystories-calibration.txt", TEXT / "tinystories-dev.txt"
        else:
            model, domain, inside = Path(name), place / "modules.txt", code
            domain.write_text(sources(CALIBRATED), encoding="utf-8")
        measured = {"domain": inside, "WikiText-2": elsewhere} | ({"code": code} if inside != code else {})
        window = ("--seq-len", 256, "--limit", limit)
        dense = {each: perplexity(model, text, *window) for each, text in measured.items()}
        lines = [
            f"| calibrated on | {' | '.join(measured)} |",
            f"|---|{'---:|' * len(measured)}",
            f"| (dense) | {' | '.join(f'{value:.4g}' for value in dense.values())} |",
        ]
        sets = {
            "domain": [domain],
            "WikiText-2": [wiki],
            "self": ["self"],
            "domain, self": [f"{domain}:1", "self:1"],
            "WikiText-2, self": [f"{wiki}:1", "self:1"],
            "domain, WikiText-2": [f"{domain}:1", f"{wiki}:1"],
        }
        for row, named in sets.items():
            if rows and row not in rows.split(";"):
                continue
            run = place / row.replace(", ", "-")
            words = [word for each in named for word in ("--calibration", each)]
            lrc("compress", model, "--method", method, "--ratio", ratio, *words, "--samples", samples,
                "--seq-len", 256, "--out", run)  # fmt: skip
            found = [perplexity(run / "model", text, *window) for text in measured.values()]
            lost = [math.log(value / base) for value, base in zip(found, dense.values(), strict=True)]
            lines.append(f"| {row} | {' | '.join(f'{v:.4g} ({x:.3f})' for v, x in zip(found, lost, strict=True))} |")
            typer.echo(lines[-1], err=True)
    typer.echo("\n".join(lines))
    if write is not None:
        write_between(write, f"calibration:{model.name}", "\n".join(lines))


if __name__ == "__main__":
    typer.run(main)
