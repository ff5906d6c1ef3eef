"""The output head of a language model in a few bits, where it has a weight of its own.

It is rounded in the metric of what enters it, a few thousand rows at a time: rows have nothing to do with each other
there. The metric of the loss would be a square of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lowrank_compress.calibration.layers import LayerMoments
from lowrank_compress.errors import InputError
from lowrank_compress.linalg.quantease import loss
from lowrank_compress.linalg.quantize import Grid
from lowrank_compress.methods.rounding import ROUNDINGS, Problem
from lowrank_compress.model.blueprint import Blueprint, blueprint
from lowrank_compress.model.checkpoint import Checkpoint
from lowrank_compress.shipped.beside import Beside
from lowrank_compress.shipped.linear import CompressedLinear
from lowrank_compress.stages.fitting import Fitted
from lowrank_compress.stages.layers import Layer
from lowrank_compress.stages.quantizeconfig import QuantizeConfig

ROWS = 4096  # that are rounded at once


def head_of(plan: Blueprint) -> Layer:
    """Find the head of a language model as a layer, of the block behind the last one.

    Raises
    ------
    InputError
        It has none with a weight of its own that is stored whole.
    """
    where = plan.checkpoint.path
    if plan.task != "lm":
        raise InputError(f"--head is for language models, and {where} is none. Leave it out.")
    if not plan.resolved.outside:
        raise InputError(
            f"The head of {where} has no weight of its own: it is the table of its tokens (tie_word_embeddings), of "
            "which packed weights cannot be looked up. Leave out --head: the table stays as it is."
        )
    (target,) = plan.resolved.outside
    if isinstance(plan.model.get_submodule(target.module), CompressedLinear):
        raise InputError(f"The head of {where} is of low rank already; --head takes one that is stored whole.")
    return Layer(target.module, target.block, target.shape, False)


def rounded_head(
    config: QuantizeConfig, layer: Layer, grid: Grid, weight: Tensor, known: LayerMoments | None, dtype: torch.dtype
) -> tuple[dict[str, Tensor], float]:
    """Round the head.

    Parameters
    ----------
    config
        Its rounding; in the place of `kfac`, `quantease`, whose metric it knows.
    layer, grid
        The head, and to what.
    weight
        (m, n), of any dtype.
    known
        What enters it; None where nothing was looked at.
    dtype
        Of scales.

    Returns
    -------
    tuple
        What `Fitted.kept` keeps of it by name, and the share of tr W G Wᵀ that is lost.
    """
    rounding = ROUNDINGS["quantease" if ROUNDINGS[config.rounding].needs == "gradients" else config.rounding]
    device = torch.device(config.device)
    gram = None if known is None else known.gram.to(device)
    metric = torch.eye(layer.shape[1], dtype=torch.float64, device=device) if gram is None else gram
    kept: dict[str, list[Tensor]] = {}
    lost = whole = 0.0
    for rows in weight.split(ROWS):
        problem = Problem(rows.to(device, torch.float64), dtype, config.damping, config.damping_fisher, gram)
        found = rounding.fit(problem, grid)
        lost += loss(problem.weight - found.matrix(), metric)
        whole += loss(problem.weight, metric)
        for name, tensor in Fitted(found, 0.0, Beside()).kept(dtype).items():
            kept.setdefault(name, []).append(tensor.cpu())
    return {name: torch.cat(parts) for name, parts in kept.items()}, lost / max(whole, torch.finfo(torch.float64).tiny)


def original_head_bytes(checkpoint: Checkpoint, before: Mapping[str, Any] | None) -> int:
    """Bytes of the head as the original stores it: in as many an element as what a report claims."""
    (target,) = blueprint(checkpoint).resolved.outside or (None,)
    if target is None:
        return 0
    if before is None or not before.get("claimed_elements"):
        return target.elements * checkpoint.dtype.itemsize
    return round(target.elements * before["claimed_bytes"] / before["claimed_elements"])


def outside_bytes(checkpoint: Checkpoint, before: Mapping[str, Any]) -> int:
    """Bytes of what is compressed outside of the blocks, from the report."""
    outside = (target.name for target in blueprint(checkpoint).resolved.outside)
    return sum(before.get("matrices", {}).get(name, {}).get("stored_bytes", 0) for name in outside)
