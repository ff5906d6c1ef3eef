"""The statistics that methods may ask for: their names, formulas and shapes.

Notation: x (tokens, in) enters a linear map, y = x Wᵀ (tokens, out) leaves it without its bias and z with it,
g = ∂ℒ/∂y of the *summed* loss, δ = g W (tokens, in). Statistics by head split z and g into (tokens, heads, size); t is,
for each key-value head, the sum of g ⊙ z over its query heads. Means of activations are over real tokens; means of
gradient products over what the summed loss is a sum of: scored tokens of a language model, examples of a classifier.
Those of a routed expert are sums over its tokens, divided as `experts` says; w is the router's weight of a token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from lowrank_compress.arch.spec import Role
from lowrank_compress.arch.targets import Target

INFLUENCE = "influence"
"""Key of a block's influence among its means: it belongs to no target."""

ROUTED = "routed"
"""Name of the statistic that says which share of all tokens an expert sees; it is taken wherever any other is."""

LIKENESS = "likeness"
"""Name of the statistic that compares experts, for which all of them are run on all tokens."""

TOKENS = "tokens"
"""Key of the number of all tokens, (1,), among the means of a block with experts."""

HALVES = "halves"
"""Key of the shares of tokens and of losses, (2,), that belong to the first half of the calibration set."""

ENOUGH, SMALL = 16, 512
"""Tokens for each dimension from which a loss on the sample is as good as one held out, and up to which dimension."""
ENOUGH_WHERE_LARGE = 2
"""The same above it, where decompositions of halves would cost more than they tell."""


def enough_tokens(dimension: int) -> int:
    """How many tokens a moment of this dimension needs, for the loss of a fit on them to be taken on the same ones.

    Measured on stories260k: at 24 tokens for each dimension both give the same ranks, at 8 a held-out loss gives 10 %
    less perplexity at 30 %, at 2 a twentieth of it.
    """
    return dimension * (ENOUGH if dimension <= SMALL else ENOUGH_WHERE_LARGE)


SHORT = 64
"""Tokens for each dimension below which a calibration set specialises a model on its domain."""


def specialises(dimension: int, tokens: int) -> bool:
    """Whether fits on so many tokens of one domain ruin others, so that random tokens beside them pay.

    Measured on models of up to `SMALL` dimensions alone, stories260k: at 24 tokens for each of 172 dimensions windows
    of random tokens take a tenth off the perplexity of other text, and cost nothing in the domain; at 190 they cost 6 %
    of it. Larger models are left as their text makes them.
    """
    return dimension <= SMALL and tokens < SHORT * dimension


@dataclass(frozen=True)
class Statistic:
    """One statistic: what it is the mean of, and what it needs.

    Attributes
    ----------
    name
        Key in tables and files.
    dimensions
        Its dimensions by name: "in" and "out" of the target; or "heads" of the target or "key_heads", with the "size"
        of one; or "experts" of its block; or "one".
    gradient
        Needs g, and is a mean over losses rather than tokens.
    shared
        Depends on the input alone, so that projections which read the same tensor share it.
    help
        The formula.
    roles
        Roles of which it can be taken; None for all.
    experts
        It can be taken of routed experts only.
    """

    name: str
    dimensions: tuple[str, ...]
    gradient: bool
    shared: bool
    help: str
    roles: tuple[Role, ...] | None = None
    experts: bool = False

    def fits(self, role: Role, expert: int | None = None) -> bool:
        """Whether it can be taken of targets of a role, be they an expert's or not."""
        return (self.roles is None or role in self.roles) and not (self.experts and expert is None)

    @property
    def filled(self) -> bool:
        """Whether the average of other experts can stand for that of one which saw no token."""
        return not self.experts

    def shape(self, target: Target) -> tuple[int, ...]:
        """Return the shape of the statistic of a target."""
        sizes = {"out": target.shape[0], "in": target.shape[1], "one": 1, "experts": target.experts}
        if target.heads is not None:
            heads = target.heads
            own = heads.query if target.role == "q" else heads.key
            sizes |= {"heads": own, "key_heads": heads.key, "size": heads.size}
        return tuple(sizes[dimension] for dimension in self.dimensions)

    def elements(self, target: Target) -> int:
        """Return the number of elements of the statistic of a target."""
        return math.prod(self.shape(target))


_BY_HEAD = ("heads", "size", "size")

STATISTICS: Mapping[str, Statistic] = {
    statistic.name: statistic
    for statistic in (
        Statistic("in_gram", ("in", "in"), False, True, "E[x xᵀ]"),
        Statistic("in_mean", ("in",), False, True, "E[x]"),
        Statistic("in_abs", ("in",), False, True, "E|x|"),
        Statistic("in_square", ("in",), False, True, "E[x²]"),
        Statistic("out_gram", ("out", "out"), False, False, "E[y yᵀ]"),
        Statistic("out_fisher", ("out", "out"), True, False, "E[g gᵀ]"),
        Statistic("in_fisher", ("in", "in"), True, False, "E[δ δᵀ]"),
        Statistic("out_square", ("out",), True, False, "E[g²]"),
        Statistic("row_fisher", ("out",), True, False, "row sums of E[(∂ℒ_sequence/∂W)²]"),
        Statistic("head_gram", _BY_HEAD, False, False, "E[z zᵀ] of each head", ("q", "k", "v")),
        Statistic("head_fisher", _BY_HEAD, True, False, "E[g gᵀ] of each head", ("q", "k", "v")),
        Statistic("score_fisher", ("key_heads", "size", "size"), True, False, "E[t tᵀ] of each key-value head", ("q",)),
        Statistic(ROUTED, ("one",), False, False, "share of the tokens that an expert sees", ("down",), True),
        Statistic("router_weight", ("one",), False, False, "E[w]", ("down",), True),
        Statistic("output_norm", ("one",), False, False, "E[‖z‖]", ("down",), True),
        Statistic("routed_norm", ("one",), False, False, "E[w ‖z‖]", ("down",), True),
        Statistic("hidden_energy", ("in",), False, False, "E[(w x)²]", ("down",), True),
        Statistic("hidden_peak", ("in",), False, False, "largest (w x)², divided by all tokens", ("down",), True),
        Statistic(LIKENESS, ("experts",), False, False, "E[cos(z, z_j)], all experts j on all tokens", ("down",), True),
    )
}


def first_half(key: str) -> str:
    """Key of a statistic of the first half of the calibration set alone, beside that of all of it."""
    return f"{key}@first"


def statistic_key(target: Target, statistic: str) -> str:
    """Key under which a target finds a statistic: its own, or that of the input it shares with others."""
    return f"{target.reads if STATISTICS[statistic].shared else target.name}/{statistic}"
