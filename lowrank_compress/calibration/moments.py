"""Running sums of products of activations and gradients, which become the means of `statistics.STATISTICS`.

The notation is that of `statistics`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lowrank_compress.arch.targets import Target
from lowrank_compress.calibration.experts import fill_unseen, likeness, routed_keys
from lowrank_compress.calibration.statistics import (
    HALVES,
    INFLUENCE,
    LIKENESS,
    ROUTED,
    STATISTICS,
    TOKENS,
    first_half,
    statistic_key,
)
from lowrank_compress.calibration.sums import PEAKS, ROWS, SUMS, Seen
from lowrank_compress.errors import InputError, NumericsError
from lowrank_compress.resources.workers import Workers

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
        # The share of the tokens that an expert sees is taken along, under the name of its down matrix.
        self._shares = routed_keys(targets, self._wanted)
        for key in self._shares.values():
            self._wanted[key.rpartition("/")[0]] |= {ROUTED}
        self._targets = targets
        self._sums: dict[str, Tensor] = {}
        # A shared statistic is summed for the first target that asks for it.
        self._owner: dict[str, str] = {}
        self._share_of: dict[str, str] = {}
        for target in targets:
            for statistic in sorted(self._wanted[target.name]):
                if not STATISTICS[statistic].fits(target.role, target.expert):
                    raise InputError(
                        f"{statistic} ({STATISTICS[statistic].help}) is taken of "
                        f"{', '.join(STATISTICS[statistic].roles or ())} only, but wanted of {target.name} "
                        f"({target.role}). Check what the method says it needs."
                    )
                key = statistic_key(target, statistic)
                self._owner.setdefault(key, target.name)
                if target.expert is not None:
                    self._share_of[key] = self._shares[target.expert]

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
            if STATISTICS[statistic].gradient != gradient or self._owner[key] != target.name or statistic == LIKENESS:
                continue
            what = f"{STATISTICS[statistic].help} of {target.name}"
            if statistic in ROWS:
                values = ROWS[statistic](seen)
                if key in self._halved:
                    self._add_rows(first_half(key), values[seen.first % 2 :: 2], what)
                    values = values[1 - seen.first % 2 :: 2]
                self._add_rows(key, values, what)
            else:
                if statistic == ROUTED and self._halved and seen.routed is not None:
                    self._sum(first_half(key), seen.routed.counts[seen.first % 2 :: 2].sum()[None], what)
                if statistic in PEAKS:
                    self._sum(key, PEAKS[statistic](seen).double(), what, torch.maximum)
                else:
                    self._sum(key, SUMS[statistic](seen).double(), what)

    @property
    def compares(self) -> bool:
        """Whether experts are compared."""
        return any(LIKENESS in names for names in self._wanted.values())

    def compare(self, experts: Sequence[Any], x: Tensor) -> None:
        """Add how alike the outputs of the block's experts are on all real tokens of a batch, x (tokens, size)."""
        found = likeness(experts, x)
        for target in self._targets:
            if target.expert is not None and self.wants(target, LIKENESS):
                key = statistic_key(target, LIKENESS)
                self._sum(key, found[target.expert].clone(), f"What the experts beside {target.name} make of a batch")

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
        rows = values.flatten(0, -2)
        size = rows.shape[1]
        if key not in self._sums:
            self._sums[key] = rows.new_zeros(size, size, dtype=torch.float64)
        add_second(self._sums[key], rows)
        _check(self._sums[key].diagonal(), what)  # an infinite row has infinite squares

    def _sum(
        self, key: str, value: Tensor, what: str, together: Callable[[Tensor, Tensor], Tensor] = torch.add
    ) -> None:
        _check(value, what)
        self._sums[key] = together(self._sums[key], value) if key in self._sums else value

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
        self._complete()
        peaks = {key: value for key, value in self._sums.items() if key.rpartition("/")[2] in PEAKS}
        workers.sum({key: value for key, value in self._sums.items() if key not in peaks}, owner)
        workers.largest(peaks, owner)
        sums, self._sums = self._sums, {}
        if workers.rank != owner:
            return {}
        halved = [key for key in sums if first_half(key) in sums]
        for key in halved:
            if not key.endswith(f"/{ROUTED}"):
                sums[key] += sums[first_half(key)]
        shares = {key: float(sums[key]) / tokens for key in self._shares.values()}
        for key, value in sums.items():
            statistic = key.rsplit("/", 1)[-1].split("@")[0]
            if statistic in ROWS:
                mirror(value)
            gradient = statistic in STATISTICS and STATISTICS[statistic].gradient
            value /= (first if "@" in key and statistic != ROUTED else (tokens, losses))[gradient]
            if gradient and (own := self._share_of.get(key.split("@")[0])):
                value /= shares[own] or 1.0
        found = {key: value.cpu() for key, value in sums.items()}
        if halved:
            found[HALVES] = torch.tensor([first[0] / tokens, first[1] / losses], dtype=torch.float64)
        if self._shares:
            found[TOKENS] = torch.tensor([tokens], dtype=torch.float64)
            fill_unseen(self._targets, self._wanted, found)
        return found

    def _complete(self) -> None:
        """Put zeros where an expert saw nothing, so that everybody who shares the work has sums of everything."""
        device = next(iter(self._sums.values())).device if self._sums else None
        for target in self._targets:
            for statistic in self._wanted[target.name] if target.expert is not None else ():
                key = statistic_key(target, statistic)
                halved = key in self._halved or (statistic == ROUTED and self._halved)
                for each in (key, first_half(key)) if halved else (key,):
                    if each not in self._sums:
                        shape = STATISTICS[statistic].shape(target)
                        self._sums[each] = torch.zeros(shape, dtype=torch.float64, device=device)


def _check(values: Tensor, what: str) -> None:
    if not torch.isfinite(values).all():
        raise NumericsError(
            f"{what} is not finite on the calibration data. Check the checkpoint, or calibrate in float32."
        )
