"""Values with fewer dimensions: the best product of W_o and W_v head by head (MoDeGPT, ICLR 2025, algorithm 3).

Attention only averages the values v of a head before W_o reads them, so what counts of the two is their product. Per
key-value head, with W_o its output slices for all query heads that share it (grouped-query attention, GQA), stacked,

    min over rank r of E‖W_o v − W_o Q_r v‖², v = W_v x + b_v,

is solved by an oblique projection Q_r = expand[:, :r] contract[:r] in the space of the head, whose far side is
Y = E[v vᵀ] and whose near side is N = W_oᵀ W_o; in the Fisher metric N = E[g gᵀ], g = ∂ℒ/∂v. The new value
contract[:r] v has r dimensions, and W_o becomes W_o expand[:, :r].
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lowrank_compress.arch.spec import Role
from lowrank_compress.arch.targets import Heads
from lowrank_compress.errors import InputError
from lowrank_compress.linalg.metric import Full
from lowrank_compress.linalg.weighted import decompose as project
from lowrank_compress.methods.linear import Damping
from lowrank_compress.methods.module import Reduced


def statistics(fisher: bool) -> Mapping[Role, frozenset[str]]:
    """Return role -> names of its statistics."""
    return {"v": frozenset({"head_gram", "head_fisher"} if fisher else {"head_gram"})}


def decompose(
    heads: Heads | None,
    weights: Mapping[Role, Tensor],
    moments: Mapping[str, Tensor],
    damping: Damping,
    fisher: bool,
) -> dict[str, Tensor]:
    """Find the best projections of every key-value head.

    Returns
    -------
    dict
        ``"expand"`` and ``"contract"``, (key, size, size) float64, columns and rows from best to worst;
        ``"tail"`` (size + 1,) float64, by width, summed over key-value heads.

    Raises
    ------
    NumericsError
        A moment is not finite, or the near metric has no invertible root.
    """
    assert heads is not None
    values = weights["v"].double().unflatten(0, (heads.key, heads.size))
    outputs = _stacked(weights["o"].double(), heads)
    near = moments["v/head_fisher"] if fisher else outputs.mT @ outputs
    shrinkage = damping.fisher if fisher else damping.gram
    projectors = [
        project(product, Full(metric, shrinkage)) for product, metric in zip(moments["v/head_gram"], near, strict=True)
    ]
    expand = torch.stack([projector.expand for projector in projectors])
    contract = torch.stack([projector.contract for projector in projectors])
    # As many units of a component to W_v as to W_o, so that neither overflows or vanishes in half precision.
    norms = torch.linalg.vector_norm(contract @ values, dim=2), torch.linalg.vector_norm(outputs @ expand, dim=1)
    scale = torch.where((norms[0] > 0) & (norms[1] > 0), norms[0] / norms[1], 1.0).sqrt()
    return {
        "expand": expand * scale[:, None],
        "contract": contract / scale[:, :, None],
        "tail": torch.stack([projector.tail() for projector in projectors]).sum(0),
    }


def reduce(
    heads: Heads | None,
    weights: Mapping[Role, Tensor],
    biases: Mapping[Role, Tensor],
    basis: Mapping[str, Tensor],
    width: int,
) -> Reduced:
    """Give the values of every head `width` dimensions; the bias of W_o stays.

    Raises
    ------
    InputError
        The width is not between 0 and the head's size.
    """
    assert heads is not None
    if not 0 <= width <= heads.size:
        raise InputError(f"The width of these values must lie between 0 and {heads.size}, got {width}.")
    expand = basis["expand"][..., :width].to(weights["v"])
    contract = basis["contract"][:, :width].to(weights["v"])
    outputs = weights["o"].unflatten(1, (heads.query, heads.size)).transpose(0, 1)
    smaller = outputs @ expand.repeat_interleave(heads.query // heads.key, dim=0)
    reduced: dict[Role, Tensor] = {
        "v": (contract @ weights["v"].unflatten(0, (heads.key, heads.size))).flatten(0, 1),
        "o": smaller.transpose(0, 1).flatten(1),
    }
    kept = dict(biases)
    if "v" in kept:
        kept["v"] = (contract @ kept["v"].view(heads.key, heads.size, 1)).flatten()
    return Reduced(reduced, kept)


def _stacked(outputs: Tensor, heads: Heads) -> Tensor:
    """Stack the slices of W_o, (out, query · size), that read one key-value head: (key, out · group, size)."""
    return outputs.unflatten(1, (heads.key, -1, heads.size)).permute(1, 0, 2, 3).flatten(1, 2)
