"""Module methods: each makes a whole module of a block smaller, not one matrix at a time (MoDeGPT, ICLR 2025)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from lowrank_compress.arch.spec import Group, Role
from lowrank_compress.arch.targets import Heads
from lowrank_compress.methods.linear import Damping
from lowrank_compress.options import Option


@dataclass(frozen=True, eq=False)
class Reduced:
    """A module at a smaller width.

    Attributes
    ----------
    weights
        Role -> W (out, in), float64.
    biases
        Role -> b (out,), float64; only of the roles that have one.
    index
        (key-value heads, width) int64: which dimension of the stock head each kept one is, in the order in which it is
        kept; None where nobody has to know.
    """

    weights: dict[Role, Tensor]
    biases: dict[Role, Tensor]
    index: Tensor | None = None


class Statistics(Protocol):
    """Say what a method needs."""

    def __call__(self, fisher: bool, /) -> Mapping[Role, frozenset[str]]:
        """Return role -> names of its statistics."""
        ...


class Decompose(Protocol):
    """Find, once, what is needed to reduce a module to any width."""

    def __call__(
        self,
        heads: Heads | None,
        weights: Mapping[Role, Tensor],
        moments: Mapping[str, Tensor],
        damping: Damping,
        fisher: bool,
        /,
    ) -> dict[str, Tensor]:
        """Return the basis: tensors to keep in a file.

        Parameters
        ----------
        heads
            How the attention is divided; None for an MLP.
        weights
            Role -> W (out, in), as stored; computed with in float64.
        moments
            ``"<role>/<statistic>"`` -> mean, float64; those of the halves of the calibration set, where it was halved,
            end in ``@first`` and ``@second``.
        damping
            How moments become metrics.
        fisher
            Weighted by the Fisher information.

        Returns
        -------
        dict
            Among others ``"tail"``, (full width + 1,) float64: the squared loss at width 0, 1, …; non-increasing,
            finite, and 0 at full width. Half of it estimates the loss increase in nats per token if `fisher`. From
            halves also ``"held_out"``, the same on other text.
        """
        ...


class Reduce(Protocol):
    """Make a module smaller."""

    def __call__(
        self,
        heads: Heads | None,
        weights: Mapping[Role, Tensor],
        biases: Mapping[Role, Tensor],
        basis: Mapping[str, Tensor],
        width: int,
        /,
    ) -> Reduced:
        """Return the module at a width; weights and biases are float64.

        Raises
        ------
        InputError
            The module cannot have that width.
        """
        ...


@dataclass(frozen=True)
class ModuleMethod:
    """A method that makes a module smaller.

    The width of a module is its number of hidden units (mlp), or of dimensions of a head (qk, vo), where all heads of a
    layer keep as many.

    Attributes
    ----------
    group
        The module: query and key, value and output, or the MLP.
    paper
        Source.
    fisher
        Weighted by the Fisher information, so that losses are in nats per token.
    allocate, storage
        What the method uses where nothing else is asked for.
    options
        What it can be told: `Damping.options` has their values.
    """

    name: str
    group: Group
    paper: str
    help: str
    statistics: Statistics
    decompose: Decompose
    reduce: Reduce
    fisher: bool = False
    allocate: str = "block-influence"
    storage: str = "pair"
    options: tuple[Option, ...] = ()

    @property
    def metrics(self) -> str:
        """What it is for, for `lrc list methods`."""
        return f"{self.group.title}; --metric gram or kfac"
