"""Running sums of products of activations and gradients, which become the means of `statistics.STATISTICS`.

The notation is that of `statistics`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_compress.arch.targets import Heads, Target
from lowrank_compress.calibration.statistics import HALVES, INFLUENCE, STATISTICS, first_half, statistic_key
from lowrank_compress.errors import InputError, NumericsError
from lowrank_compress.resources.workers import Workers


@dataclass(frozen=True)
class Seen:
    """What one target sees of one batch.

    Attributes
    ----------
    x
        (sequences, length, in); padded positions are zero.
    y
        (sequences, length, out) without bias; padded positions are zero.
    z
        (sequences, length, out) with the bias; padded positions are zero.
    g
        (sequences, length, out), or None where no gradient is taken; padded positions are zero.
    delta
        g W, (sequences, length, in), where ``in_fisher`` is wanted of the target and g is there; or None.
    heads
        How an attention projection divides; None in the MLP.
    first
        Number of the first sequence in the calibration set.
    """

    x: Tensor
    y: Tensor
    z: Tensor
    g: Tensor | None
    delta: Tensor | None
    heads: Heads | None
    first: int = 0


def _rows(values: Tensor) -> Tensor:
    return values.flatten(0, -2)


PANEL = 256


def add_second(total: Tensor, rows: Tensor) -> None:
    """Add Σ v vᵀ over rows v, (tokens, n), to the lower block triangle of (n, n).

    Products are in the rows' dtype, the sum in that of the total; what is temporary has PANEL columns.
    """
    for start in range(0, len(total), PANEL):
        panel = slice(start, start + PANEL)
        total[start:, panel] += rows[:, start:].T @ rows[:, panel]


def mirror(total: Tensor) -> None:
    """Copy the lower block triangle to the upper one, in place."""
    for stop in range(PANEL, len(total), PANEL):
        panel = slice(stop - PANEL, stop)
        total[panel, stop:] = total[stop:, panel].T


def _gradient(seen: Seen) -> Tensor:
    assert seen.g is not None
    return seen.g


def _delta(seen: Seen) -> Tensor:
    assert seen.delta is not None
    return seen.delta


def _heads(seen: Seen) -> Heads:
    assert seen.heads is not None
    return seen.heads


def _second_by_head(values: Tensor, heads: Heads) -> Tensor:
    """Σ over tokens of v vᵀ of each head, (heads, size, size); values are (…, heads · size)."""
    parts = _rows(values).unflatten(1, (-1, heads.size)).movedim(1, 0)
    return parts.mT @ parts


def _score_gradient(z: Tensor, g: Tensor, heads: Heads) -> Tensor:
    """Return t, (…, key · size): the sum of g ⊙ z over the query heads of each key-value head."""
    return (g * z).unflatten(-1, (heads.key, -1, heads.size)).sum(-2).flatten(-2)


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


# Statistics that are second moments of whole rows, by those rows; and the other ones.
ROWS: Mapping[str, Callable[[Seen], Tensor]] = {
    "in_gram": lambda seen: seen.x,
    "out_gram": lambda seen: seen.y,
    "out_fisher": _gradient,
    "in_fisher": _delta,
}
SUMS: Mapping[str, Callable[[Seen], Tensor]] = {
    "in_mean": lambda seen: _rows(seen.x).sum(0),
    "in_abs": lambda seen: _rows(seen.x).abs().sum(0),
    "in_square": lambda seen: _rows(seen.x).square().sum(0),
    "out_square": lambda seen: _rows(_gradient(seen)).square().sum(0),
    "row_fisher": lambda seen: row_sums_of_squared_gradients(seen.x, _gradient(seen)),
    "head_gram": lambda seen: _second_by_head(seen.z, _heads(seen)),
    "head_fisher": lambda seen: _second_by_head(_gradient(seen), _heads(seen)),
    "score_fisher": lambda seen: _second_by_head(_score_gradient(seen.z, _gradient(seen), _heads(seen)), _heads(seen)),
}


def turned(before: Tensor, after: Tensor) -> Tensor:
    """1 − the cosine of each token's vectors, (…,) float64, of (…, width); a zero vector counts as not turned."""
    before, after = before.double(), after.double()
    norms = before.norm(dim=-1) * after.norm(dim=-1)
    return torch.where(norms == 0, 0.0, 1 - (before * after).sum(-1) / norms)


class Moments:
    """Sums of one block's statistics; products in the computing dtype, sums across batches in float64.

    Parameters
    ----------
    targets
        The block's targets.
    wanted
        Target name -> names of the statistics it needs.
    halved
        Keys of the second moments whose sums are kept for the two halves of the calibration set: its even and its odd
        sequences. What is fitted on one half can be scored on the other.

    Raises
    ------
    InputError
        A statistic is wanted of a target that has none.
    """

    def __init__(
        self,
        targets: tuple[Target, ...],
        wanted: Mapping[str, frozenset[str]],
        halved: frozenset[str] = frozenset(),
    ) -> None:
        self._halved = halved
        self._wanted = {target.name: wanted.get(target.name, frozenset()) for target in targets}
        self._sums: dict[str, Tensor] = {}
        # A shared statistic is summed for the first target that asks for it.
        self._owner: dict[str, str] = {}
        for target in targets:
            for statistic in sorted(self._wanted[target.name]):
                if not STATISTICS[statistic].fits(target.role):
                    raise InputError(
                        f"{statistic} ({STATISTICS[statistic].help}) is taken of "
                        f"{', '.join(STATISTICS[statistic].roles or ())} only, but wanted of {target.name} "
                        f"({target.role}). Check what the method says it needs."
                    )
                self._owner.setdefault(statistic_key(target, statistic), target.name)

    def wants(self, target: Target, statistic: str) -> bool:
        """Whether a statistic is wanted of a target."""
        return statistic in self._wanted[target.name]

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
            what = f"{STATISTICS[statistic].help} of {target.name}"
            if statistic in ROWS:
                values = ROWS[statistic](seen)
                if key in self._halved:
                    self._add_rows(first_half(key), values[seen.first % 2 :: 2], what)
                    values = values[1 - seen.first % 2 :: 2]
                self._add_rows(key, values, what)
            else:
                self._sum(key, SUMS[statistic](seen).double(), what)

    def add_influence(self, before: Tensor, after: Tensor, mask: Tensor | None) -> None:
        """Add one batch to the block's influence, 1 − the mean cosine of its input and output.

        The score of ShortGPT (Men et al., 2024), which MoDeGPT allocates by.

        Parameters
        ----------
        before, after
            The hidden states that enter and leave the block, (sequences, length, width).
        mask
            (sequences, length), 1 for real tokens; None where nothing is padded.

        Raises
        ------
        NumericsError
            A hidden state is NaN or infinite.
        """
        change = turned(before.detach(), after.detach())
        if mask is not None:
            change = change.masked_fill(~mask.bool().to(change.device), 0)
        self._sum(INFLUENCE, change.sum()[None], "The influence of a block")

    def _add_rows(self, key: str, values: Tensor, what: str) -> None:
        rows = _rows(values)
        size = rows.shape[1]
        if key not in self._sums:
            self._sums[key] = rows.new_zeros(size, size, dtype=torch.float64)
        add_second(self._sums[key], rows)
        _check(self._sums[key].diagonal(), what)  # an infinite row has infinite squares

    def _sum(self, key: str, value: Tensor, what: str) -> None:
        _check(value, what)
        if key in self._sums:
            self._sums[key] += value
        else:
            self._sums[key] = value

    def means(
        self,
        tokens: int,
        losses: int,
        workers: Workers = Workers(),
        owner: int = 0,
        first: tuple[int, int] = (0, 0),
    ) -> dict[str, Tensor]:
        """Divide: activations by real tokens, gradients by scored tokens or examples. Float64, on the CPU.

        The sums themselves become the means; nothing can be added any more. Of a halved statistic there are the mean
        over all and that over the first half (`statistics.first_half`); `statistics.HALVES` says which share that is.

        Parameters
        ----------
        tokens, losses
            Of all workers together.
        first
            Tokens and losses of the first half.
        workers, owner
            Who has taken sums of the same block, and which of them gets the means; the others get none.
        """
        workers.sum(self._sums, owner)
        sums, self._sums = self._sums, {}
        if workers.rank != owner:
            return {}
        halved = [key for key in sums if first_half(key) in sums]
        for key in halved:
            sums[key] += sums[first_half(key)]
        for key, value in sums.items():
            statistic = key.rsplit("/", 1)[-1].split("@")[0]
            if statistic in ROWS:
                mirror(value)
            counts = first if "@" in key else (tokens, losses)
            value /= counts[statistic in STATISTICS and STATISTICS[statistic].gradient]
        found = {key: value.cpu() for key, value in sums.items()}
        if halved:
            found[HALVES] = torch.tensor([first[0] / tokens, first[1] / losses], dtype=torch.float64)
        return found


def _check(values: Tensor, what: str) -> None:
    if not torch.isfinite(values).all():
        raise NumericsError(
            f"{what} is not finite on the calibration data. Check the checkpoint, or calibrate in float32."
        )
