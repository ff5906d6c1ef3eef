"""Sums of products of what enters a map in one model and what it is to emit by another, over halves of the text."""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank_compress.calibration.moments import add_second, mirror
from lowrank_compress.errors import NumericsError
from lowrank_compress.linalg.refine import Sample
from lowrank_compress.model.walk.batch import Batch

# Columns of what is multiplied at once.
PANEL = 1024


class PairSums:
    """Sums over the even and over the odd sequences of a text; products in the computing dtype, sums in float64."""

    def __init__(self) -> None:
        self._halves: list[Sample | None] = [None, None]

    def add(self, batch: Batch, inputs: Tensor, targets: Tensor) -> None:
        """Add a batch.

        Parameters
        ----------
        batch
            Says which tokens are real, and which half a sequence belongs to.
        inputs, targets
            x̂ and t, (sequences, length, n) and (sequences, length, k), on one device.

        Raises
        ------
        NumericsError
            One is not finite.
        """
        for half in range(2):
            rows = slice((half + batch.first) % 2, None, 2)
            x, t = inputs[rows].flatten(0, -2), targets[rows].flatten(0, -2)
            if batch.mask is not None:
                real = batch.mask[rows].bool().flatten().to(x.device)
                x, t = x[real], t[real]
            if len(x):
                self._halves[half] = _added(self._halves[half], x, t)

    def samples(self) -> tuple[Sample, Sample]:
        """Return the sums of both halves, once; a half without a token has zeros."""
        first, second = self._halves
        self._halves = [None, None]
        there = first or second
        if there is None:
            raise ValueError("No token was added.")
        for half in (first, second):
            if half is not None:
                mirror(half.gram)
        return first or _empty(there), second or _empty(there)


def _added(sums: Sample | None, x: Tensor, t: Tensor) -> Sample:
    if sums is None:
        wide = x.new_zeros(x.shape[1], x.shape[1]).double()
        sums = Sample(wide, wide.new_zeros(t.shape[1], x.shape[1]), wide[0].clone(), wide.new_zeros(t.shape[1]), 0)
    add_second(sums.gram, x)
    for start in range(0, x.shape[1], PANEL):
        sums.cross[:, start : start + PANEL] += t.T @ x[:, start : start + PANEL]
    inputs, targets = sums.inputs + x.double().sum(0), sums.targets + t.double().sum(0)
    if not all(bool(values.isfinite().all()) for values in (sums.gram.diagonal(), inputs, targets)):
        raise NumericsError("An activation is not finite on the calibration data. Check both checkpoints.")
    return Sample(sums.gram, sums.cross, inputs, targets, sums.count + len(x))


def _empty(like: Sample) -> Sample:
    gram, cross, inputs, targets = map(torch.zeros_like, (like.gram, like.cross, like.inputs, like.targets))
    return Sample(gram, cross, inputs, targets, 0)
