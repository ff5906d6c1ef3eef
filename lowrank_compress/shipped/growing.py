"""A compressed layer with a low-rank product added to its weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .formats.base import Part
from .formats.dense import Dense
from .linear import CompressedLinear


@torch.no_grad()
def grown(layer: CompressedLinear, left: Tensor, right: Tensor, bias: Tensor | None = None) -> CompressedLinear:
    """Make the layer whose weight is that of `layer` plus ``left @ right``, exact up to rounding.

    A matrix of rank k needs rank k + r for that: each part keeps its format at a rank r higher, but where that would
    take as much as the matrix itself (or the format has no place for it), which is then dense.

    Parameters
    ----------
    left, right : Tensor
        (out_features, r) and (r, in_features).
    bias : Tensor, optional
        (out_features,), to be added to the layer's bias, which must be there.

    Raises
    ------
    ValueError
        The weights are not in memory.
    """
    old = layer.lr_in.get_parameter("weight")
    if old.device.type == "meta":
        raise ValueError("the weights of a compressed layer are not in memory: load the model without offloading")
    wide = torch.float32 if old.device.type == "mps" else torch.float64
    left, right = left.to(old.device, wide), right.to(old.device, wide)
    inner = old.to(wide).split([part.width for part in layer.parts])
    rows, found, offset = left.unflatten(0, (layer.heads, -1)), [], 0
    for part, own in zip(layer.parts, inner, strict=True):
        size = part.rows // layer.heads
        found.append(_part(layer, part, own, rows[:, offset : offset + size].flatten(0, 1), right))
        offset += size
    made = CompressedLinear(
        layer.in_features,
        layer.out_features,
        layer.bias is not None,
        [entry for entry, _ in found],
        layer.heads,
        layer.stock,
        old.device,
        old.dtype,
    )
    tensors = {"lr_in.weight": torch.cat([each["lr_in.weight"] for _, each in found]), "weight": layer.weight}
    for part, (_, each) in zip(made.parts, found, strict=True):
        for name, tensor in each.items():
            if name != "lr_in.weight":
                leaf, dot, below = name.partition(".")
                tensors[f"{leaf}{part.suffix}{dot}{below}"] = tensor
    if layer.bias is not None:
        tensors["bias"] = layer.bias if bias is None else layer.bias.to(wide) + bias.to(old.device, wide)
    made.load_state_dict(tensors)
    made.remember_order()
    return made.requires_grad_(old.requires_grad).train(layer.training)


def _part(
    layer: nn.Module, part: Part, inner: Tensor, left: Tensor, right: Tensor
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the entry and the tensors of a part with a product added."""
    kind, n, rank = type(part), right.shape[1], part.width + left.shape[1]
    if kind is Dense or kind.parameters != ("rank",):
        rank = 0
    entry = kind.describe(part.rows, n, rank) if rank else {}
    if rank and not kind.problem(entry) and kind.elements(part.rows, n, rank) < part.rows * n:
        tensors = part.grown(layer, inner, left, right)
        if tensors is not None:
            return entry, tensors
    emitted = torch.cat(part.emitted_rows(layer, inner))
    whole = torch.empty_like(emitted)
    whole[part.order(layer, inner.device)] = emitted
    return Dense.describe(part.rows, n), {"lr_in.weight": whole + left @ right}
