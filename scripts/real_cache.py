"""Give a real language model a smaller key-value cache; print bytes, perplexity by position and speed, in markdown.

The model stays dense (`--method dense --kv-ratio`), calibrated on a text and on code together, and is measured on other
code, with a whole window in each forward pass. Speed is that of decoding after a prompt, by `lrc bench`, original and
compressed in turn; below 1 it is slower. Moments are computed once for all cells.

Usage, from the root of the repository (an hour)::

    python scripts/real_cache.py DIRECTORY/qwen2.5-coder-0.5b
    python scripts/real_cache.py DIRECTORY/qwen2.5-coder-0.5b --cells 0.5,0.8:32 --write docs/methods.md
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from calibration_texts import CALIBRATED
from real_model import sources, texts
from running import ASSETS, lrc, write_between

MORE_CODE = ("argparse", "typing", "subprocess", "inspect", "pathlib", "logging", "threading", "zipfile")


def row(name: str, compressed: str, found: dict[str, Any], speed: dict[int, float | None]) -> str:
    """One line of the table: the side of an evaluation that is asked for, and what decoding has of the dense speed."""
    (measured,) = found["perplexity"].values()
    kept = found["size"]["kv_bytes_4096"][compressed] / 1e6
    parts = [f"{part[compressed]:.3f}" for part in measured["positions"].values()]
    shown = ["" if rate is None else f"{rate:.2f}" for rate in speed.values()]
    return f"| {name} | {kept:.1f} MB | {measured[compressed]:.3f} | {' | '.join(parts + shown)} |"


def main(
    model: Annotated[Path, typer.Argument(help="Directory of the model.")],
    cells: Annotated[
        str, typer.Option(help="Shares to remove of the cache, `:` and exact positions, if any.")
    ] = "0.5,0.5:32,0.8:32",
    samples: Annotated[int, typer.Option(help="Windows of 512 tokens to calibrate on.")] = 48,
    seq_len: Annotated[int, typer.Option(help="Tokens of a window to measure on.")] = 2048,
    limit: Annotated[int, typer.Option(help="Windows to measure on.")] = 8,
    prompts: Annotated[
        str, typer.Option(help="Tokens before those that are decoded, separated by commas.")
    ] = "512,4096",
    run: Annotated[Path | None, typer.Option(help="Keeps the run; one that is there is gone on with.")] = None,
    write: Annotated[Path | None, typer.Option(help="File whose table is replaced.")] = None,
) -> None:
    """Print the table."""
    lengths = [int(length) for length in prompts.split(",")]
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        run = run or place / "run"
        calibration = texts(ASSETS / "text" / "wikitext2-valid.txt", place)[0]
        modules, held = place / "modules.txt", place / "more.txt"
        modules.write_text(sources(CALIBRATED), encoding="utf-8")
        held.write_text(sources(MORE_CODE), encoding="utf-8")
        lines: list[str] = []
        for cell in cells.split(","):
            ratio, _, window = cell.partition(":")
            mixed = ("--calibration", f"{calibration}:1", "--calibration", f"{modules}:1")
            asked = ("--method", "dense", "--kv-ratio", ratio, *(("--kv-window", window) if window else ()))
            given = (*mixed, "--samples", samples, "--seq-len", 512)
            lrc("compress", model, *asked, *given, "--out", run, "--overwrite")
            found = lrc("eval", run, "--perplexity", held, "--seq-len", seq_len, "--limit", limit, "--by-position")
            shape = ("--batch-size", 1, "--prompt-tokens", prompts, "--new-tokens", 16, "--rounds", 2)
            bench = lrc("bench", run, *shape, "--dtype", "float32", "--threads", 1)
            other = next(name for name in bench["models"] if name != bench["base"])
            speed = {
                each["prompt_tokens"]: each["models"][other]["decode"]["ratio"]["median"]
                for each in bench["measurements"]
            }
            if not lines:
                (measured,) = found["perplexity"].values()
                heads = ["cache", "at 4,096 tokens", "perplexity", *(f"{part}" for part in measured["positions"])]
                heads += [f"speed after {length:,}" for length in lengths]
                lines += [f"| {' | '.join(heads)} |", f"|---|{'---:|' * (len(heads) - 1)}"]
                lines.append(row("dense", "dense", found, dict.fromkeys(lengths)))
            said = f"−{float(ratio):.0%}" + (f", {window} exact" if window else "")
            lines.append(row(said, "compressed", found, speed))
            typer.echo(lines[-1], err=True)
    made = "\n".join(lines)
    typer.echo(made)
    if write is not None:
        write_between(write, f"cache:{model.name}", made)


if __name__ == "__main__":
    typer.run(main)
