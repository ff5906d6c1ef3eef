"""lowrank.json of a quantized checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lowrank_compress.model import packing
from lowrank_compress.model.blueprint import Blueprint
from lowrank_compress.stages.fitting import Way
from lowrank_compress.stages.origin import about
from lowrank_compress.stages.quantizing import Layer, Quantizer, described
from lowrank_compress.stages.report import beyond_claimed


def is_stock(quantizer: Quantizer, chosen: Mapping[str, Way]) -> bool:
    """Whether the quantized checkpoint is one of a stock model, in the format of compressed-tensors."""
    found = quantizer.plan.checkpoint.quantization or {}
    smaller = any(found.get(kind) for kind in ("modules", "dense_shapes", "attention", "experts", "routers"))
    plain = not any(layer.transposed for layer in quantizer.layers)
    config = quantizer.config
    beside = config.aided or (config.inside and any(way.rank for way in chosen.values()))
    return plain and config.symmetric and not beside and not smaller


def report_of(
    quantizer: Quantizer, chosen: Mapping[str, Way], before: Mapping[str, Any] | None, own: int
) -> dict[str, Any]:
    """Make lowrank.json."""
    config, layers = quantizer.config, described(quantizer, chosen)
    weights = sum(layer.weights for layer in quantizer.layers)
    taken = sum(entry["bytes"] for entry in layers.values())
    stored = own + taken - sum(quantizer.bytes_of(layer, None) for layer in quantizer.layers)
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
        "unit": ("½‖Δe‖² a text" if quantizer.plan.task == "embedding" else "nats") if nats else "share",
        **({"beside": _beside(quantizer, chosen)} if config.aided or config.inside else {}),
        "format": packing.METHOD if is_stock(quantizer, chosen) else "lowrank",
        "left": quantizer.left,
        "layers": layers,
    }
    if before is None:
        return {"schema": 1, "method": "dense", "about": about(quantizer.plan), "quantize": said}
    return {**before, **_bytes_now(before, quantizer.plan, stored), "quantize": said}


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


def _bytes_now(before: Mapping[str, Any], plan: Blueprint, stored: int) -> dict[str, Any]:
    """What a report of the checkpoint before says of bytes, as it is now."""
    if "reached_ratio_bytes" not in before:  # an older version counted elements alone
        return {}
    others, whole = beyond_claimed(before, plan)
    beside = others * getattr(torch, before["dtype"]).itemsize
    return {"stored_bytes": stored, "reached_ratio_bytes": 1 - (stored + beside) / whole}
