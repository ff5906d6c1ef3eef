"""Plans for a budget in bytes: of each part of a model the hull over what it may become and in how many bits.

A point of a group is a choice (dense, low rank, narrower) and a number of bits, and stores bytes; what it loses is what
the choice loses and what rounding adds (`methods.few_bits`). One allocation takes the best points of all under the
budget. Choices alone are kept of it: in how many bits each matrix is stored at the end is chosen once more, by what its
rounding has come to (`lrc quantize`).

How much less than rounding to the nearest point the better ways lose is not known beforehand, so that several shares of
it are tried (`GAINS`). They compete on held-out text, stored as they would be in the end (`stages.trial`), with the
dense matrices in few bits, and with ranks for equal bits everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lowrank_compress.allocation.alternatives import choose
from lowrank_compress.allocation.choice import DENSE, Choice, of_ranks
from lowrank_compress.allocation.curve import Curve, least_stored
from lowrank_compress.allocation.loss import allocate
from lowrank_compress.formats.packed import BITS, Packing
from lowrank_compress.methods.candidates import Candidates
from lowrank_compress.methods.edit import Source
from lowrank_compress.methods.few_bits import Ways, ways_of
from lowrank_compress.stages.bytebudget import QUANTIZED, itemsize_of, limit_of, packing_of
from lowrank_compress.stages.choice import Plan, different
from lowrank_compress.stages.choose import Chooser
from lowrank_compress.stages.decompose import Bases

GAINS = (0.5, 0.25)
LOW_RANK, MIXED = "low-rank", "mixed"


@dataclass(frozen=True, eq=False)
class _Points:
    """Curves of all groups in bytes, and what is behind the points of each."""

    curves: Mapping[str, Curve]
    choices: Mapping[str, Sequence[Choice]]


def byte_plans(bases: Bases) -> list[Plan]:
    """Plan for a budget in bytes, in all ways that compete; in front is what is taken where none can be tried.

    Parameters
    ----------
    bases
        Decompositions of all groups.

    Raises
    ------
    InputError
        The budget is out of reach.
    """
    chooser = bases.chooser
    budget = chooser.config.bytes
    assert budget is not None
    known, limit = dict(_all_ways(bases, packing_of(budget))), limit_of(budget, chooser.subject)
    found = list[Plan]()
    if budget.mix in ("auto", QUANTIZED):
        points = _points(chooser, known, GAINS[0], dense=True)
        if budget.mix == QUANTIZED or least_stored(_first(chooser, points)) <= limit:
            found.append(_plan(QUANTIZED, bases, points, limit))
    if budget.mix in ("auto", MIXED):
        for gain in GAINS if chooser.small else GAINS[:1]:
            points = _points(chooser, known, gain)
            name = MIXED if gain == GAINS[0] else f"{MIXED}, rounding at {gain:g}"
            found.append(_plan(name, bases, points, limit))
    if budget.mix in ("auto", LOW_RANK):
        found += _low_rank(bases, known, limit)
    return different(found)


def _low_rank(bases: Bases, known: Mapping[str, Ways], limit: int) -> list[Plan]:
    """Plan ranks for equal bits everywhere: those bits at which least is predicted to be lost."""
    plans = []
    for number in range(len(BITS)):
        points = _points(bases.chooser, known, GAINS[0], bits=slice(number, number + 1))
        if least_stored(_first(bases.chooser, points)) <= limit:
            plans.append(_plan(LOW_RANK, bases, points, limit))
    return [min(plans, key=lambda plan: plan.predicted)] if plans else []


def _first(chooser: Chooser, points: _Points) -> list[Curve]:
    """The curves of each part's smallest candidate."""
    found = []
    for part in chooser.subject.candidates:
        each = [[points.curves[group.name] for group in groups] for groups in part.each]
        found += min(each, key=least_stored)
    return found


def _all_ways(bases: Bases, packing: Packing) -> Iterator[tuple[str, Ways]]:
    chooser = bases.chooser
    read = chooser.subject.model
    # Losses are in nats whatever the dtype; what is not packed plays no part in them.
    source = Source(read.weight, read.bias, torch.device("cpu"), torch.float32, chooser.config.round_to)
    for block in chooser.subject.scopes:
        basis = bases.files.read(block)
        for group in chooser.of_block(block):
            yield group.name, ways_of(group, source, basis, packing, BITS)


def _points(
    chooser: Chooser,
    known: Mapping[str, Ways],
    gain: float,
    *,
    bits: slice = slice(None),
    dense: bool = False,
) -> _Points:
    """Make the curves, of some numbers of `bits`, or of matrices that are as large as they were (`dense`)."""
    curves, choices, itemsize = {}, {}, itemsize_of(chooser.config)
    for group in chooser.groups:
        ways = known[group.name]
        which = slice(1) if dense else slice(None)  # the first is dense
        stored = ways.stored[which, bits]
        loss = (ways.loss[which, None] + gain * ways.rounding[which, bits]).flatten()
        number = np.repeat(np.arange(len(stored)), stored.shape[1])
        stored, whole = stored.flatten(), sum(target.elements for target in group.targets) * itemsize
        order = np.lexsort((loss, stored))
        order = order[stored[order] < whole]
        best = np.minimum.accumulate(loss[order])
        order = order[np.append(True, best[1:] < best[:-1])] if len(order) else order
        made = of_ranks("stored", number[order], stored[order])
        curves[group.name] = Curve(
            group.name, made, np.append(stored[order], whole), np.append(loss[order], 0.0), block=group.block
        )
        choices[group.name] = [*(ways.choices[n] for n in number[order]), DENSE]
    return _Points(curves, choices)


def _plan(name: str, bases: Bases, points: _Points, limit: int) -> Plan:
    parts: Sequence[Candidates] = bases.chooser.subject.candidates
    sites = [[[points.curves[group.name] for group in groups] for groups in part.each] for part in parts]
    picked = choose(sites, limit)
    groups = tuple(group for part, one in zip(parts, picked, strict=True) for group in part.each[one])
    own = [points.curves[group.name] for group in groups]
    chosen = allocate(own, limit)
    choices = {group.name: points.choices[group.name][point] for group, point in zip(groups, chosen, strict=True)}
    predicted = float(sum(curve.loss[point] for curve, point in zip(own, chosen, strict=True)))
    return Plan(name, bases, groups, choices, predicted)
