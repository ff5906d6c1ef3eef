"""The model of a run and what of it is compressed, resolved once and handed from stage to stage."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from lowrank_compress.arch.targets import Resolved, Target
from lowrank_compress.config import Scheme
from lowrank_compress.methods.candidates import Candidates, all_groups, candidates_of
from lowrank_compress.methods.groups import TargetGroup
from lowrank_compress.model.blueprint import Blueprint
from lowrank_compress.model.checkpoint import Checkpoint


@dataclass(frozen=True, eq=False)
class Subject:
    """A dense model, and the parts of its blocks that a scheme compresses.

    Attributes
    ----------
    model
        The dense model.
    candidates
        Its parts, and what each may be compressed as.
    rival
        The same by the scheme that plans are held against; empty where there is none.
    cache
        What its cache may keep, block by block, if that is not keys and values.
    """

    model: Blueprint
    candidates: tuple[Candidates, ...]
    rival: tuple[Candidates, ...] = ()
    cache: tuple[Candidates, ...] = ()

    @property
    def checkpoint(self) -> Checkpoint:
        """Where the model is read from."""
        return self.model.checkpoint

    @property
    def resolved(self) -> Resolved:
        """Its blocks and targets."""
        return self.model.resolved

    @property
    def scopes(self) -> range:
        """Numbers of the blocks, and of what is outside of them if any of that is compressed."""
        return scopes_of(self.resolved, self.groups)

    @property
    def largest(self) -> int:
        """The longest side of any matrix of the blocks."""
        return max(max(target.shape) for target in self.resolved.targets)

    @property
    def claimed(self) -> tuple[Target, ...]:
        """Matrices that the ratio of the blocks counts, and those outside that are compressed."""
        compressed = {target.name for part in self.candidates for group in part.each[0] for target in group.targets}
        return claimed_of(self.resolved, compressed)

    @property
    def groups(self) -> tuple[TargetGroup, ...]:
        """The groups of all candidates, and of what the cache may keep."""
        return all_groups((*self.candidates, *self.cache))

    @property
    def measured(self) -> tuple[TargetGroup, ...]:
        """The groups that statistics are taken for: those of the rival, too."""
        return all_groups((*self.candidates, *self.cache, *self.rival))


def scopes_of(resolved: Resolved, groups: Iterable[TargetGroup]) -> range:
    """Numbers of the blocks, and of what is outside of them if a group is."""
    return range(max([len(resolved.blocks), *(group.block + 1 for group in groups)]))


def claimed_of(resolved: Resolved, compressed: Collection[str]) -> tuple[Target, ...]:
    """Return the targets of the blocks, and those outside whose names are among the compressed ones'."""
    return (*resolved.targets, *(target for target in resolved.outside if target.name in compressed))


def subject_of(model: Blueprint, scheme: Scheme, rival: Scheme | None = None) -> Subject:
    """Find what schemes compress of a model.

    Raises
    ------
    LrcError
        As `candidates_of`.
    """
    found = candidates_of(model.resolved, scheme)
    return Subject(
        model,
        tuple(part for part in found if not part.cache),
        () if rival is None else candidates_of(model.resolved, rival),
        tuple(part for part in found if part.cache),
    )
