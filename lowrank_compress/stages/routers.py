"""How the routers of a mixture shared out the calibration set, from what lowrank.json says of its experts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def shares_of(experts: Mapping[str, Any]) -> dict[str, list[float]]:
    """Return the share of the choices that each expert of a block got, by the path of the block's experts.

    Blocks in which nothing was counted, or no token was seen, are left out.

    Parameters
    ----------
    experts
        ``experts`` of lowrank.json, by path.
    """
    tokens = dict[str, list[int]]()
    for path, expert in experts.items():
        if expert["tokens"] is not None:
            tokens.setdefault(path.rpartition(".")[0], []).append(expert["tokens"])
    return {path: [count / sum(counts) for count in counts] for path, counts in tokens.items() if sum(counts)}


def in_effect(shares: list[float]) -> float:
    """Return the number of experts which, choosing each equally often, would have the entropy of these shares."""
    return math.exp(-sum(share * math.log(share) for share in shares if share))


def routers_of(experts: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Say of each block how many experts there are and are in effect, and what the busiest and the idlest got."""
    return {
        path: {"experts": len(shares), "busiest": max(shares), "idlest": min(shares), "in_effect": in_effect(shares)}
        for path, shares in shares_of(experts).items()
    }
