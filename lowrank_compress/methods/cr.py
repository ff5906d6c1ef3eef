"""Queries and keys with fewer dimensions: which columns of W_q and W_k to keep (CR; MoDeGPT, ICLR 2025, algorithm 2).

A score is qᵀk, a sum over the dimensions of a head, so dropping the dimensions D of query and key changes it by
Σ_{i∈D} q_i k_i. Over all pairs of a query and a key the mean square of that is Σ_{i,j∈D} C_q,ij C_k,ij, with C_q = E[q
qᵀ] and C_k = E[k kᵀ]. The query heads that share a key-value head (grouped-query attention, GQA) keep the same
dimensions; their costs add up.

In the Fisher metric the change of the scores counts by what it does to the loss: with g = ∂ℒ/∂q and t = Σ g∘q over the
query heads of a group, dropping D changes the loss of a token by −Σ_{i∈D} t_i to first order, and costs
½ Σ_{i,j∈D} E[t tᵀ]_ij as any Gauss-Newton term.

Rotary embeddings turn dimension i together with i + rotary/2, so the two are kept or dropped together, with their own
frequency: a *unit*. Averaged over all angles the products of different units vanish, and a pair's mean square is
½ (C_q,ii + C_q,jj)(C_k,ii + C_k,jj). Dimensions that are not rotated form units of two as well and are given the same
score, so that all compare.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lowrank_compress.arch.spec import Role
from lowrank_compress.arch.targets import Heads
from lowrank_compress.errors import InputError
from lowrank_compress.linalg.columns import elimination_order
from lowrank_compress.methods.linear import Damping
from lowrank_compress.methods.module import Reduced


def statistics(fisher: bool) -> Mapping[Role, frozenset[str]]:
    """Return role -> names of its statistics."""
    if fisher:
        return {"q": frozenset({"score_fisher"})}
    return {"q": frozenset({"head_gram"}), "k": frozenset({"head_gram"})}


def decompose(
    heads: Heads | None,
    weights: Mapping[Role, Tensor],
    moments: Mapping[str, Tensor],
    damping: Damping,
    fisher: bool,
) -> dict[str, Tensor]:
    """Order the units of every key-value head; nothing is inverted, so nothing is damped.

    Returns
    -------
    dict
        ``"order"`` (key, units) int64, best first; ``"tail"`` (size + 1,) float64, by width, summed over key-value
        heads; a width that splits a unit has the tail of the next lower one that does not.

    Raises
    ------
    InputError
        The dimensions that are not rotated cannot be paired up.
    NumericsError
        A moment is not finite.
    """
    assert heads is not None
    members = unit_members(heads)
    found = [elimination_order(cost) for cost in _costs(heads, members, moments, fisher)]
    tail = torch.stack([tail for _, tail in found]).sum(0)
    widths = torch.arange(heads.size + 1, device=tail.device)
    return {"order": torch.stack([order for order, _ in found]), "tail": tail[widths // members.shape[1]]}


def reduce(
    heads: Heads | None,
    weights: Mapping[Role, Tensor],
    biases: Mapping[Role, Tensor],
    basis: Mapping[str, Tensor],
    width: int,
) -> Reduced:
    """Keep the best dimensions of every head: ascending, or first members of the pairs and then second members.

    The index says which they are where a model has rotary embeddings.

    Raises
    ------
    InputError
        The width is not between 0 and the head's size, or would split a pair.
    """
    assert heads is not None
    members = unit_members(heads)
    paired = members.shape[1]
    if not 0 <= width <= heads.size or width % paired:
        even = " and be even, because rotary embeddings turn dimensions in pairs" if paired == 2 else ""
        raise InputError(f"The width of these queries and keys must lie between 0 and {heads.size}{even}, got {width}.")
    units = basis["order"][:, : width // paired].sort(dim=1).values
    index = members.to(units.device)[units].transpose(1, 2).flatten(1)
    rows = {
        "q": _rows(index.repeat_interleave(heads.query // heads.key, dim=0), heads.size),
        "k": _rows(index, heads.size),
    }
    return Reduced(
        {role: weight[rows[role].to(weight.device)] for role, weight in weights.items()},
        {role: bias[rows[role].to(bias.device)] for role, bias in biases.items()},
        index if paired == 2 else None,
    )


def unit_members(heads: Heads) -> Tensor:
    """Return the dimensions of each unit of a head, (units, 1 or 2) int64.

    Raises
    ------
    InputError
        The dimensions cannot be paired up.
    """
    size, rotary = heads.size, heads.rotary
    if not rotary:
        return torch.arange(size)[:, None]
    if rotary > size or rotary % 2 or size % 2:
        raise InputError(
            f"Heads of size {size} with {rotary} rotated dimensions cannot lose dimensions in pairs: expected an even "
            "number of either kind. Use a linear method for queries and keys."
        )
    turned = torch.arange(rotary).view(2, -1).mT
    return torch.cat([turned, torch.arange(rotary, size).view(-1, 2)])


def _costs(heads: Heads, members: Tensor, moments: Mapping[str, Tensor], fisher: bool) -> Tensor:
    """Return the cost matrix of every key-value head, (key, units, units)."""
    if fisher:
        products = moments["q/score_fisher"]
        among = members.to(products.device)
        return products[:, among[:, :, None, None], among].sum((2, 4))
    queries = moments["q/head_gram"].unflatten(0, (heads.key, -1)).sum(1)
    keys = moments["k/head_gram"]
    if members.shape[1] == 1:
        return queries * keys
    among = members.to(keys.device)
    of_queries, of_keys = (moment.diagonal(dim1=1, dim2=2)[:, among].sum(2) for moment in (queries, keys))
    return torch.diag_embed(of_queries * of_keys / 2)


def _rows(index: Tensor, size: int) -> Tensor:
    """Return the rows of a weight that the dimensions (heads, width) of its heads are."""
    return (index + torch.arange(len(index), device=index.device)[:, None] * size).flatten()
