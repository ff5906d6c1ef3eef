"""The model of a run and what of it is compressed, resolved once and handed from stage to stage."""

from __future__ import annotations

from dataclasses import dataclass

from lowrank_compress.arch.resolve import Resolved
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
    def units(self) -> tuple[Unit, ...]:
        """The units of all ways."""
        return all_units(self.sites)

    @property
    def measured(self) -> tuple[Unit, ...]:
        """The units that statistics are taken for: those of the rival, too."""
        return all_units((*self.sites, *self.rival))


def subject_of(model: Blueprint, scheme: Scheme, rival: Scheme | None = None) -> Subject:
    """Find what schemes compress of a model.

    Raises
    ------
    LrcError
        As `sites_of`.
    """
    return Subject(model, sites_of(model.resolved, scheme), () if rival is None else sites_of(model.resolved, rival))
