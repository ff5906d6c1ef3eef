"""lowrank.json of a quantized checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lowrank_compress.model import packing
from lowrank_compress.model.names import experts_of
from lowrank_compress.model.tasks import Task, unit_of_loss
from lowrank_compress.stages.fitting import Way
from lowrank_compress.stages.layers import Layer
from lowrank_compress.stages.origin import Heard, about
from lowrank_compress.stages.quantizeconfig import QuantizeConfig
from lowrank_compress.stages.quantizing import Quantizer
from lowrank_compress.stages.report import beyond_claimed


def is_stock(quantizer: Quantizer, chosen: Mapping[str, Way]) -> bool:
    """Whether the quantized checkpoint is one of a stock model, in the format of compressed-tensors.

    transformers unpacks the experts of all blocks by one of the config's groups, and rounds their weights to the dtype
    of scales.
    """
    found = quantizer.plan.checkpoint.quantization or {}
    smaller = any(found.get(kind) for kind in ("modules", "dense_shapes", "attention", "experts", "routers"))
    plain = not any(layer.transposed for layer in quantizer.layers) and not quantizer.plan.pieces
    routed = {_kind(quantizer, layer, chosen.get(layer.path)) for layer in quantizer.layers if layer.expert}
    plain = plain and (not routed or (len(routed) == 1 and None not in routed and quantizer.scales == quantizer.dtype))
    config = quantizer.config
    beside = config.aided or (config.inside and any(way.rank for way in chosen.values()))
    return plain and config.symmetric and not beside and not smaller


def _kind(quantizer: Quantizer, layer: Layer, way: Way | None) -> tuple[int, int] | None:
    """Say what a layer is stored in: bits, and the columns of a group, 0 where all of a row are one; None for as is."""
    if way is None:
        return None
    group = quantizer.packing.grid(layer.shape[1], way.bits).group
    return way.bits, 0 if group == layer.shape[1] else group


def separated(quantizer: Quantizer, chosen: Mapping[str, Way]) -> dict[str, int]:
    """Return how many experts there are at each path at which they become modules of their own."""
    if is_stock(quantizer, chosen):
        return {}
    before = (quantizer.plan.checkpoint.quantization or {}).get("experts", {})
    packed = {(layer.expert or "").rpartition(".")[0] for layer in quantizer.layers if layer.path in chosen}
    found = experts_of(quantizer.plan.model).items()
    whole = bool(quantizer.plan.pieces)  # stored in one tensor: all are taken out of it
    return {path: len(experts) for path, experts in found if whole or path in before or path in packed}


def report_of(quantizer: Quantizer, chosen: Mapping[str, Way], before: Mapping[str, Any] | None) -> dict[str, Any]:
    """Make lowrank.json."""
    config, layers = quantizer.config, described(quantizer, chosen)
    weights = sum(layer.weights for layer in quantizer.layers)
    taken = sum(entry["bytes"] for entry in layers.values())
    stored = quantizer.other_bytes + taken
    nats = quantizer.rounding.needs == "gradients"
    apart = 0 if config.aided or config.inside else config.residual_rank
    said = {
        "rounding": config.rounding,
        "asked_bits": config.bits,
        "asked_bytes": config.bytes,
        "bits_per_weight": 8 * taken / weights,
        "weights": weights,
        "layer_bytes": taken,
        "stored_bytes": stored,
        "original_bytes": quantizer.original_bytes,
        "residual_rank": config.residual_rank,
        "residual_bytes": sum(_residual_bytes(layer, apart) for layer in quantizer.layers),
        "predicted_loss": sum(entry.get("loss", 0.0) for entry in layers.values()) if nats else None,
        "unit": kind_of_loss(config, quantizer.plan.task) if nats else "share",
        **({"beside": _beside(quantizer, chosen)} if config.aided or config.inside else {}),
        "format": packing.METHOD if is_stock(quantizer, chosen) else "lowrank",
        **_experts(quantizer),
        **_head(quantizer),
        "left": quantizer.left,
        "layers": layers | _head_layer(quantizer),
    }
    if before is None:
        return {
            "schema": 1,
            "method": "dense",
            "about": about(quantizer.plan, Heard(paired=Heard.of(config).paired)),
            "quantize": said,
        }
    return {**before, **_bytes_now(before, quantizer, stored), "quantize": said}


def kind_of_loss(config: QuantizeConfig, task: Task) -> str:
    """Name what losses are in; "nats" where the head says of what (`naming.loss_unit`)."""
    return unit_of_loss(task, Heard.of(config).paired) if task in ("embedding", "scores") else "nats"


def _experts(quantizer: Quantizer) -> dict[str, Any]:
    """Say how many experts there are, and which saw few tokens."""
    found = {layer.expert for layer in quantizer.layers} - {None}
    return {"experts": {"count": len(found), "thin": quantizer.thin()}} if found else {}


def _head(quantizer: Quantizer) -> dict[str, Any]:
    """Say what the head takes, if it is rounded."""
    if quantizer.head is None:
        return {}
    return {"head": {"bits": quantizer.way_of_head.bits, "bytes": quantizer.head_bytes}}


def _head_layer(quantizer: Quantizer) -> dict[str, Any]:
    """Say of the head what `described` does of others; its loss is a share always."""
    if (layer := quantizer.head) is None:
        return {}
    grid = quantizer.packing.grid(layer.shape[1], quantizer.way_of_head.bits)
    share = quantizer.rounded.notes(layer.block)["share"]
    said = {"shape": list(layer.shape), "bits": grid.bits, "bytes": quantizer.head_bytes, "group": grid.group}
    return {layer.path: said | {"symmetric": grid.symmetric, "share": share}}


def _beside(quantizer: Quantizer, chosen: Mapping[str, Way]) -> dict[str, Any]:
    """Say what all layers together have beside their codes."""
    config = quantizer.config
    found = [quantizer.beside(layer, chosen[layer.path]) for layer in quantizer.layers if layer.path in chosen]
    return {
        "smooth": config.smooth,
        "outliers": config.outliers,
        "outlier_columns": sum(each.outliers for each in found),
        "columns": sum(layer.shape[1] for layer in quantizer.layers),
        "activation_bits": config.activation_bits,
        "rank": config.residual_rank,
        **({"products": sum(each.rank > 0 for each in found)} if config.inside else {}),
    }


def _residual_bytes(layer: Layer, rank: int) -> int:
    """Bytes of a layer's product, in two bytes a number."""
    return 2 * min(rank, *layer.shape) * sum(layer.shape)


def _bytes_now(before: Mapping[str, Any], quantizer: Quantizer, stored: int) -> dict[str, Any]:
    """What a report of the checkpoint before says of bytes, as it is now; the head is none of its claimed weights."""
    if "reached_ratio_bytes" not in before:  # an older version counted elements alone
        return {}
    others, whole = beyond_claimed(before, quantizer.plan)
    beside, claimed = others * getattr(torch, before["dtype"]).itemsize, stored - quantizer.head_bytes
    if others and quantizer.head is not None:
        beside -= quantizer.bytes_of(quantizer.head, None) - quantizer.head_bytes
    return {"stored_bytes": claimed, "reached_ratio_bytes": 1 - (claimed + beside) / whole}


def described(quantizer: Quantizer, chosen: Mapping[str, Way]) -> dict[str, Any]:
    """Say of each layer how it is stored, for lowrank.json."""
    losses = quantizer.losses()
    found = {}
    for layer in quantizer.layers:
        way = chosen.get(layer.path)
        bits, size = None if way is None else way.bits, quantizer.bytes_of(layer, way)
        entry: dict[str, Any] = {"shape": list(layer.shape), "bits": bits, "bytes": size}
        if way is not None:
            grid = quantizer.packing.grid(layer.shape[1], way.bits)
            entry |= {"group": grid.group, "symmetric": grid.symmetric, "loss": losses[layer.path][way.key]}
            entry |= quantizer.beside(layer, way).entry
        found[layer.path] = entry
    return found
