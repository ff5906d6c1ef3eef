"""Methods for the experts of a block as a whole: which of them, or which of their hidden units, are kept.

They rank by a saliency, keep the best as they are, and make nothing up for the rest. Notation: a token t goes to an
expert with the router's weight w; y (d,) is the expert's output without it, h its hidden units, and w_i the i-th column
of its down-projection, so that y = Σ_i h_i w_i. Means are sums over an expert's tokens, divided by *all* tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lowrank_compress.arch.spec import EXPERTS, Group
from lowrank_compress.calibration.statistics import ROUTED
from lowrank_compress.options import PEAK, Option

Saliency = Callable[[Tensor, Mapping[str, Tensor], Mapping[str, Any]], Tensor]
"""From W_d (d, width), statistics of it by name, float64, and options to the saliencies of one expert."""


@dataclass(frozen=True)
class ExpertMethod:
    """A method that keeps the best of all experts of a block, or of all their hidden units.

    Attributes
    ----------
    statistics
        Of the down-projections.
    saliency
        Of one expert: (1,) float64 if whole experts are ranked, (width,) if units are; never negative, and what is lost
        by leaving something out is the sum of its saliencies. None where experts are merged.
    merges
        Whole experts go, and others, which are made of them and of themselves, stand for them (see `merge`). Else:
    whole
        Whole experts go, and the router forgets them, so that their tokens go to others. Else each expert gets the
        width that is left, which may be 0, and the router stays as it is.
    paper
        Source.
    allocate, storage
        What the method uses where nothing else is asked for.
    options
        What it can be told: `Damping.options` has their values.
    """

    name: str
    paper: str
    help: str
    statistics: frozenset[str]
    saliency: Saliency | None
    whole: bool
    merges: bool = False
    group: Group = EXPERTS
    allocate: str = "uniform"
    storage: str = "pair"
    options: tuple[Option, ...] = ()

    @property
    def metrics(self) -> str:
        """What it is for, for `lrc list methods`."""
        return (
            f"{self.group.title}; whole ones"
            if self.whole or self.merges
            else f"{self.group.title}; their hidden units"
        )


def frequency(down: Tensor, seen: Mapping[str, Tensor], options: Mapping[str, Any]) -> Tensor:
    """Share of the tokens that go to the expert, (1,)."""
    return seen[ROUTED]


def routed_output(down: Tensor, seen: Mapping[str, Tensor], options: Mapping[str, Any]) -> Tensor:
    """Σ_t w ‖y‖ over the expert's tokens, divided by all tokens, (1,)."""
    return seen["routed_norm"]


def mean_routed_output(down: Tensor, seen: Mapping[str, Tensor], options: Mapping[str, Any]) -> Tensor:
    """Mean of w ‖y‖ over the expert's own tokens, (1,); 0 where it saw none."""
    return seen["routed_norm"] / seen[ROUTED] if float(seen[ROUTED]) > 0 else seen["routed_norm"]


def routed_energy(down: Tensor, seen: Mapping[str, Tensor], options: Mapping[str, Any]) -> Tensor:
    """Energy of each hidden unit, (width,), as CAMERA has it, divided by all tokens.

    It is ((1 − α) ‖φ_i‖₂² + α ‖φ_i‖_∞²) ‖w_i‖², where φ_i are the w h_i of all tokens. With α = 0 it is the mean square
    of what the unit adds to the block's output; α gives weight to units that add much, but seldom.
    """
    alpha = float(options.get(PEAK.name, PEAK.default))
    return ((1 - alpha) * seen["hidden_energy"] + alpha * seen["hidden_peak"]) * down.double().square().sum(0)
