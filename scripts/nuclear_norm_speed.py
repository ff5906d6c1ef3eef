"""Measure what the Matrix Nuclear-Norm saves over matrix entropy, and how far it is from the exact nuclear norm.

Both are taken of random representations whose directions fall off as a power of their number, of several sizes, in
turn, by CPU time, which a busy machine hardly changes; the least of the rounds counts. Matrix entropy is taken twice:
by the SVD of the representations, as published code takes it, and by the eigenvalues of the smaller Gram matrix, as
this package does. Usage, from the root of the repository::

    OMP_NUM_THREADS=1 python scripts/nuclear_norm_speed.py
    python scripts/nuclear_norm_speed.py --widths 768,1024,2048 --tokens 512
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Annotated

import torch
import typer
from torch import Tensor

from lowrank_compress.linalg.spectra import (
    entropy,
    matrix_entropy,
    matrix_nuclear_norm,
    normalised,
)


def representations(tokens: int, width: int, decay: float, seed: int) -> Tensor:
    """Random states (tokens, width) float32, turned, whose directions have sizes k^−decay."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.arange(1, width + 1, dtype=torch.float32) ** -decay
    turned = torch.linalg.qr(torch.randn(width, width, generator=generator))[0]
    return torch.randn(tokens, width, generator=generator) * sizes @ turned


def entropy_by_svd(states: Tensor) -> float:
    """Matrix entropy by singular values of the representations."""
    return entropy(torch.linalg.svdvals(normalised(states)).square())


def least(measured: Callable[[Tensor], float], states: Tensor, rounds: int) -> float:
    """CPU seconds that a measure takes: the least of some rounds, after one that is not counted."""
    taken = []
    for _ in range(rounds + 1):
        start = time.process_time()
        measured(states)
        taken.append(time.process_time() - start)
    return min(taken[1:])


def main(
    widths: Annotated[str, typer.Option(help="Widths, separated by commas.")] = "256,512,768,1024,2048",
    tokens: Annotated[int, typer.Option(help="Tokens.")] = 1024,
    decay: Annotated[float, typer.Option(help="How the directions fall off.")] = 0.5,
    rounds: Annotated[int, typer.Option(help="Rounds of each.")] = 3,
) -> None:
    """Print a table in markdown."""
    typer.echo(f"{tokens} tokens, {torch.get_num_threads()} threads\n")
    typer.echo("| width | Matrix Nuclear-Norm | entropy by Gram | ratio | entropy by SVD | ratio | estimate ÷ exact |")
    typer.echo("|---:|---:|---:|---:|---:|---:|---:|")
    for width in map(int, widths.split(",")):
        states = representations(tokens, width, decay, seed=0)
        fast, gram, svd = (
            least(each, states, rounds) for each in (matrix_nuclear_norm, matrix_entropy, entropy_by_svd)
        )
        off = matrix_nuclear_norm(states) / matrix_nuclear_norm(states, exact=True)
        cells = [f"{fast * 1e3:.1f} ms", f"{gram * 1e3:.0f} ms", f"{gram / fast:.0f}×", f"{svd * 1e3:.0f} ms"]
        typer.echo(f"| {width} | {' | '.join(cells)} | {svd / fast:.0f}× | {off:.2f} |")


if __name__ == "__main__":
    typer.run(main)
