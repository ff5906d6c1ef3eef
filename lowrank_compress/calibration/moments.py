"""Running means of products of activations and gradients.

Notation: x (tokens, in) enters a linear map, y = x Wᵀ (tokens, out) leaves it (without the bias), g = ∂ℒ/∂y of the
*summed* loss, δ = g W (tokens, in). Means of activations are over real tokens; means of gradient products over what the
summed loss is a sum of: scored tokens of a language model, examples of a classifier.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_compress.arch.resolve import Target
from lowrank_compress.errors import NumericsError


@dataclass(frozen=True)
class Statistic:
    """One statistic: what it is the mean of, and what it needs.

    Attributes
    ----------
    name
        Key in tables and files.
    size
        "in" or "out": the dimension of a target that it has.
    square
        A matrix (size, size) rather than a vector (size,).
    gradient
        Needs g, and is a mean over losses rather than tokens.
    shared
        Depends on the input alone, so that projections which read the same tensor share it.
    """

    name: str
    size: str
    square: bool
    gradient: bool
    shared: bool
    help: str


STATISTICS: Mapping[str, Statistic] = {
    statistic.name: statistic
    for statistic in (
        Statistic("in_gram", "in", True, False, True, "E[x xᵀ]"),
        Statistic("in_mean", "in", False, False, True, "E[x]"),
        Statistic("in_abs", "in", False, False, True, "E|x|"),
        Statistic("in_square", "in", False, False, True, "E[x²]"),
        Statistic("out_gram", "out", True, False, False, "E[y yᵀ]"),
        Statistic("out_fisher", "out", True, True, False, "E[g gᵀ]"),
        Statistic("in_fisher", "in", True, True, False, "E[δ δᵀ]"),
        Statistic("out_square", "out", False, True, False, "E[g²]"),
        Statistic("row_fisher", "out", False, True, False, "row sums of E[(∂ℒ_sequence/∂W)²]"),
    )
}


def statistic_key(target: Target, statistic: str) -> str:
    """Key under which a target finds a statistic: its own, or that of the input it shares with others."""
    return f"{target.reads if STATISTICS[statistic].shared else target.name}/{statistic}"


@dataclass(frozen=True)
class Seen:
    """What one target sees of one batch.

    Attributes
    ----------
    x
        (sequences, length, in); padded positions are zero.
    y
        (sequences, length, out) without bias; padded positions are zero.
    g
        (sequences, length, out), or None where no gradient is taken; padded positions are zero.
    weight
        W, (out, in).
    """

    x: Tensor
    y: Tensor
    g: Tensor | None
    weight: Tensor


def _rows(values: Tensor) -> Tensor:
    return values.flatten(0, -2)


def _second(values: Tensor) -> Tensor:
    flat = _rows(values)
    return flat.T @ flat


def _gradient(seen: Seen) -> Tensor:
    assert seen.g is not None
    return seen.g


def row_sums_of_squared_gradients(x: Tensor, g: Tensor) -> Tensor:
    """Sum over sequences of the row sums of (∂ℒ/∂W)², ∂ℒ/∂W = gᵀx of a sequence; (out,).

    Takes the cheaper of two equal ways: form ∂ℒ/∂W, or use Σ_j (gᵀx)²_ij = g_iᵀ (x xᵀ) g_i without forming it.

    Parameters
    ----------
    x
        (sequences, length, in).
    g
        (sequences, length, out).
    """
    length, width, out = x.shape[1], x.shape[2], g.shape[2]
    if length * (width + out) < width * out:
        return (g * ((x @ x.transpose(1, 2)) @ g)).sum((0, 1))
    return (g.transpose(1, 2) @ x).square().sum((0, 2))


SUMS: Mapping[str, Callable[[Seen], Tensor]] = {
    "in_gram": lambda seen: _second(seen.x),
    "in_mean": lambda seen: _rows(seen.x).sum(0),
    "in_abs": lambda seen: _rows(seen.x).abs().sum(0),
    "in_square": lambda seen: _rows(seen.x).square().sum(0),
    "out_gram": lambda seen: _second(seen.y),
    "out_fisher": lambda seen: _second(_gradient(seen)),
    "in_fisher": lambda seen: _second(_gradient(seen) @ seen.weight),
    "out_square": lambda seen: _rows(_gradient(seen)).square().sum(0),
    "row_fisher": lambda seen: row_sums_of_squared_gradients(seen.x, _gradient(seen)),
}


class Moments:
    """Sums of one block's statistics; products in the computing dtype, sums across batches in float64.

    Parameters
    ----------
    wanted
        Target name -> names of the statistics it needs.
    """

    def __init__(self, targets: tuple[Target, ...], wanted: Mapping[str, frozenset[str]]) -> None:
        self._wanted = {target.name: wanted.get(target.name, frozenset()) for target in targets}
        self._sums: dict[str, Tensor] = {}
        # A shared statistic is summed for the first target that asks for it.
        self._owner: dict[str, str] = {}
        for target in targets:
            for statistic in sorted(self._wanted[target.name]):
                self._owner.setdefault(statistic_key(target, statistic), target.name)

    def add(self, target: Target, seen: Seen, *, gradient: bool) -> None:
        """Add one batch's statistics of a target: those of gradients, or those of activations.

        Raises
        ------
        NumericsError
            An activation or gradient is NaN or infinite.
        """
        for statistic in sorted(self._wanted[target.name]):
            key = statistic_key(target, statistic)
            if STATISTICS[statistic].gradient != gradient or self._owner[key] != target.name:
                continue
            value = SUMS[statistic](seen).double()
            if not torch.isfinite(value).all():
                raise NumericsError(
                    f"{STATISTICS[statistic].help} of {target.name} is not finite on the calibration data. Check the "
                    "checkpoint, or calibrate in float32."
                )
            if key in self._sums:
                self._sums[key] += value
            else:
                self._sums[key] = value

    def means(self, tokens: int, losses: int) -> dict[str, Tensor]:
        """Divide: activations by real tokens, gradients by scored tokens or examples. Float64, on the CPU."""
        count = {False: tokens, True: losses}
        return {
            key: (value / count[STATISTICS[key.rsplit("/", 1)[1]].gradient]).cpu() for key, value in self._sums.items()
        }
