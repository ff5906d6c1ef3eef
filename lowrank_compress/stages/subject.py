"""The model of a run and what of it is compressed, resolved once and handed from stage to stage."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from lowrank_compress.arch.targets import Resolved, Target
from lowrank_compress.config import Scheme
from lowrank_compress.methods.sites import Site, all_units, sites_of
from lowrank_compress.methods.units import Unit
from lowrank_compress.model.blueprint import Blueprint
from lowrank_compress.model.checkpoint import Checkpoint


@dataclass(frozen=True, eq=False)
class Subject:
    """A dense model, and the parts of its blocks that a scheme compresses.

    Attributes
    ----------
    model
        The dense model.
    sites
        Its parts, and for each the ways to compress it.
    rival
        The same by the scheme that plans are held against; empty where there is none.
    """

    model: Blueprint
    sites: tuple[Site, ...]
    rival: tuple[Site, ...] = ()

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
        return scopes_of(self.resolved, self.units)

    @property
    def claimed(self) -> tuple[Target, ...]:
        """Matrices that the ratio of the blocks counts, and those outside that are compressed."""
        compressed = {target.name for site in self.sites for unit in site.alternatives[0] for target in unit.targets}
        return claimed_of(self.resolved, compressed)

    @property
    def units(self) -> tuple[Unit, ...]:
        """The units of all ways."""
        return all_units(self.sites)

    @property
    def measured(self) -> tuple[Unit, ...]:
        """The units that statistics are taken for: those of the rival, too."""
        return all_units((*self.sites, *self.rival))


def scopes_of(resolved: Resolved, units: Iterable[Unit]) -> range:
    """Numbers of the blocks, and of what is outside of them if a unit is."""
    return range(max(len(resolved.blocks), *(unit.block + 1 for unit in units)))


def claimed_of(resolved: Resolved, compressed: Collection[str]) -> tuple[Target, ...]:
    """Return the targets of the blocks, and those outside whose names are among the compressed ones'."""
    return (*resolved.targets, *(target for target in resolved.outside if target.name in compressed))


def subject_of(model: Blueprint, scheme: Scheme, rival: Scheme | None = None) -> Subject:
    """Find what schemes compress of a model.

    Raises
    ------
    LrcError
        As `sites_of`.
    """
    return Subject(model, sites_of(model.resolved, scheme), () if rival is None else sites_of(model.resolved, rival))
