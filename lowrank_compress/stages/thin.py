"""What stands for the moments of experts that saw few tokens, or none, when their matrices are rounded.

A Gram matrix of fewer tokens than columns says of most directions that errors there cost nothing, which is not so. It
is damped by as much more as tokens are lacking, c (n / tokens − 1) times its mean diagonal for the damping c of all:
with ever fewer tokens this is ever more like rounding to the nearest point. An expert that saw none is rounded so; its
errors count as if its inputs and gradients were as large as those of the block's other experts, and all alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lowrank_compress.calibration.layers import LayerMoments, Seen
from lowrank_compress.linalg.sweep import damped
from lowrank_compress.stages.layers import Layer
from lowrank_compress.stages.quantizeconfig import QuantizeConfig


def made_up(
    layers: Sequence[Layer], moments: Mapping[str, LayerMoments], config: QuantizeConfig
) -> dict[str, LayerMoments]:
    """Return what the layers of a block are rounded by: what was seen, and what stands for it in experts.

    Parameters
    ----------
    layers
        Those of the block.
    moments
        By path; none where nothing was looked at.
    config
        Its damping.
    """
    found = dict(moments)
    for layer in layers:
        known = moments.get(layer.path)
        if known is None or layer.expert is None:
            continue
        alike = [moments[each.path] for each in layers if each.role == layer.role and moments[each.path].tokens]
        gram = _made_up(known.gram, [each.gram for each in alike], known.tokens, config.damping)
        fisher = known.fisher
        if fisher is not None:
            others = [each.fisher for each in alike if each.fisher is not None]
            fisher = _made_up(fisher, others, known.tokens, config.damping_fisher)
        seen = known.seen
        if config.aided and seen is None:
            nothing = torch.zeros(1, layer.shape[1], dtype=torch.float64)
            seen = Seen(nothing[0], nothing)
        found[layer.path] = replace(known, gram=gram, fisher=fisher, seen=seen)
    return found


def _made_up(moment: Tensor, alike: Sequence[Tensor], tokens: int, damping: float) -> Tensor:
    """Damp a moment (n, n) of few tokens; of none, or of zeros, return the mean of the others' diagonals everywhere."""
    if tokens >= len(moment):
        return moment
    if bool(moment.any()):
        return damped(moment, damping * (len(moment) / tokens - 1))
    means = [float(each.diagonal().mean()) for each in alike]
    return torch.eye(len(moment), dtype=moment.dtype) * (sum(means) / len(means) if means else 1.0)


def thin_experts(layers: Sequence[Layer], moments: Mapping[str, LayerMoments]) -> dict[str, int]:
    """Return the tokens of those experts of a block that saw fewer than a layer of theirs has columns, or rows."""
    found: dict[str, int] = {}
    for layer in layers:
        known = moments.get(layer.path)
        if known is not None and layer.expert is not None:
            needed = layer.shape[1] if known.fisher is None else max(layer.shape)
            if known.tokens < needed:
                found[layer.expert] = known.tokens
    return found
