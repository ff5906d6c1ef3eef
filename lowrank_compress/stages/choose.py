"""The choice among the candidates of each part of a model, under the budget; nothing is read or computed of weights."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np

from lowrank_compress.allocation.alternatives import choose
from lowrank_compress.allocation.curve import Curve
from lowrank_compress.allocation.table import ALLOCATORS
from lowrank_compress.calibration.statistics import SMALL
from lowrank_compress.config import ScoreConfig
from lowrank_compress.errors import InputError
from lowrank_compress.methods.candidates import Candidates, all_groups, first_groups, yardsticks
from lowrank_compress.methods.groups import TargetGroup, largest_kept, ranking
from lowrank_compress.options import only
from lowrank_compress.stages.cachebudget import require_cache_reachable
from lowrank_compress.stages.curves import lossless_curve
from lowrank_compress.stages.reach import budget_of, require_reachable
from lowrank_compress.stages.subject import Subject

# From this ratio on predicted losses, which are of second order, decide little.
MUCH = 0.4


class Chooser:
    """Knows what may be chosen in a model, and chooses by curves.

    Parameters
    ----------
    config
        The ratio, the allocator, and what decides which ranks can be asked for.
    subject
        The dense model, and what of it is compressed.

    Attributes
    ----------
    groups
        What is chosen among: of all candidates, or of the first where losses, which alone compare them, are not known;
        and what the cache may keep.
    cache
        The latter alone.
    budget
        What may be stored.
    keep
        TargetGroup -> the largest rank that can be asked for.
    nats
        Whether losses are in nats a token; else each is a share of its group's own total.
    yardsticks
        Of groups that are one of several alternatives, those whose mean total takes the place of their own.

    Raises
    ------
    InputError
        The ratio is out of reach.
    """

    def __init__(self, config: ScoreConfig, subject: Subject) -> None:
        self.config, self.subject = config, subject
        self.allocator = ALLOCATORS[config.allocate]
        self.cache = first_groups(subject.cache)
        main = all_groups(subject.candidates) if self.allocator.needs_loss else first_groups(subject.candidates)
        self.groups = (*main, *self.cache)
        self.nats = all(group.nats for group in main)
        self.yardsticks = yardsticks(subject.candidates) if self.allocator.needs_loss else {}
        require_cache_reachable(config, subject.cache)
        self.budget = budget_of(config, subject)
        require_reachable(config, self.budget, subject.candidates)
        self.keep = self._largest_ranks()

    @cached_property
    def rival(self) -> Chooser | None:
        """Chooses what plans are held against, by settings of its own; None where little is removed.

        In small models it is there always, so that another ratio can be asked for when the statistics are gone.
        """
        config, subject = self.config, self.subject
        if config.rival is None or not (self.small or config.ratio >= MUCH) or not self.allocator.needs_loss:
            return None
        if self.allocator.alike:  # the rival's blocks are not
            return None
        own = {"scheme": config.rival, "allocate": "block-influence", "storage": "pair", "rival": None}
        with contextlib.suppress(InputError):  # the ratio is out of its reach
            return Chooser(config.model_copy(update=own | {"held_out": False}), Subject(subject.model, subject.rival))
        return None

    @property
    def small(self) -> bool:
        """Whether no matrix is so large that time would have to be saved."""
        return self.subject.largest <= SMALL

    def of_block(self, block: int) -> tuple[TargetGroup, ...]:
        """Return the groups of one block."""
        return tuple(group for group in self.groups if group.block == block)

    def _largest_ranks(self) -> dict[str, int]:
        """The largest rank of each group that can pay; under an allocator that looks at nothing, the one it chooses."""
        if self.allocator.needs_loss or self.allocator.needs_spectrum or self.allocator.needs_influence:
            return {group.name: largest_kept(group, ranking(group, self.config.storage)) for group in self.groups}
        main = self.groups[: len(self.groups) - len(self.cache)]
        curves = [lossless_curve(group, self.config) for group in main]
        chosen = [curve.choice(point) for curve, point in zip(curves, self.allocate(curves), strict=True)]
        found = {
            group.name: 0 if choice.is_dense else group.keep(choice) for group, choice in zip(main, chosen, strict=True)
        }
        return found | {group.name: largest_kept(group, group.formats[0]) for group in self.cache}

    def allocate(self, curves: Sequence[Curve]) -> np.ndarray:
        """Choose a point of each curve under the budget, (curves,) int64; the curves are those of one candidate."""
        if not curves:
            return np.zeros(0, dtype=np.int64)
        return self.allocator.allocate(curves, self.budget.limit, **only(self.allocator.options, self.config.options))

    def choose(self, curves: Mapping[str, Curve]) -> tuple[TargetGroup, ...]:
        """Return the groups of the better candidate of each part."""
        candidates = self.subject.candidates
        if not candidates:
            return ()
        if self.allocator.alike:
            return self._choose_alike(curves)
        each = [[[curves[group.name] for group in one] for one in self._usable(part)] for part in candidates]
        picked = choose(each, self.budget.limit)
        best = [self._usable(part)[number] for part, number in zip(candidates, picked, strict=True)]
        return tuple(group for candidate in best for group in candidate)

    def of_position(self, position: int) -> tuple[TargetGroup, ...]:
        """Return the groups of the first (0) or the last (-1) candidate of every part."""
        return tuple(group for part in self.subject.candidates for group in part.each[position])

    def _choose_alike(self, curves: Mapping[str, Curve]) -> tuple[TargetGroup, ...]:
        """Return the groups of the better candidate, one for all parts, as blocks are to be alike."""
        losses: dict[tuple[TargetGroup, ...], float] = {}
        for groups in dict.fromkeys(self.of_position(position) for position in (0, -1)):
            own = [curves[group.name] for group in groups]
            with contextlib.suppress(InputError):  # out of reach
                chosen = self.allocate(own)
                losses[groups] = sum(float(c.loss[point]) for c, point in zip(own, chosen, strict=True))
        return min(losses, key=losses.__getitem__, default=self.of_position(0))

    def _usable(self, part: Candidates) -> tuple[tuple[TargetGroup, ...], ...]:
        return part.each if self.allocator.needs_loss else part.each[:1]
