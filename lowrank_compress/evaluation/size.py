"""How large a checkpoint is: parameters and bytes, blocks and whole model, KV cache."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lowrank_compress.arch.targets import Target
from lowrank_compress.model.blueprint import Blueprint, blueprint
from lowrank_compress.model.checkpoint import Checkpoint
from lowrank_compress.model.surgery import ROTARY


@dataclass(frozen=True)
class Size:
    """Elements and bytes, of what is stored.

    Attributes
    ----------
    blocks, block_bytes
        Elements and bytes stored for the claimed weights inside the blocks (factors, coefficients and indices
        included).
    model
        Elements of the whole model; tied tensors count once.
    bytes
        Bytes of these tensors on disk.
    kv_bytes_per_token
        Bytes that one token adds to the key-value cache, in the checkpoint's dtype; 0 for a model without one.
    """

    blocks: int
    block_bytes: int
    model: int
    bytes: int
    kv_bytes_per_token: int


def measure_size(checkpoint: Checkpoint) -> Size:
    """Count from the headers of the files; no tensor is read."""
    plan = blueprint(checkpoint)
    claimed = tuple(f"{path}." for path in plan.resolved.modules())
    names = plan.outside() + [name for block in range(len(plan.resolved.blocks)) for name in plan.inside(block)]
    blocks = block_bytes = elements = total = 0
    for name in names:
        shape, size = checkpoint.stored(plan.name_on_disk(name))
        count = _weights_in(plan, name, math.prod(shape))
        elements += count
        total += size
        if (name.startswith(claimed) and not name.endswith(".bias")) or name.endswith(f".{ROTARY}"):
            blocks += count
            block_bytes += size
    return Size(blocks, block_bytes, elements, total, kv_bytes(checkpoint))


def _weights_in(plan: Blueprint, name: str, elements: int) -> int:
    """Count the elements of a tensor; of packed weights the weights, and nothing for what says their grid."""
    path, _, leaf = name.rpartition(".")
    if not leaf.startswith("weight_"):
        return elements
    shape = plan.model.get_submodule(path).get_parameter("weight").shape
    return math.prod(shape) if leaf == "weight_packed" else 0


def weight_bytes(plan: Blueprint, target: Target) -> int:
    """Bytes of a matrix as the checkpoint stores it, from the header of its file."""
    shape, size = plan.checkpoint.stored(plan.name_on_disk(target.parameter))
    return size * target.elements // math.prod(shape)


def kv_bytes(checkpoint: Checkpoint) -> int:
    """Bytes that one token adds to the key-value cache."""
    plan = blueprint(checkpoint)
    if plan.task != "lm":
        return 0
    heads, path = plan.resolved.heads, plan.resolved.architecture.attention
    settings = checkpoint.quantization or {}
    narrower = settings.get("attention", {})
    width = 0
    for block in plan.resolved.blocks:
        entry = narrower.get(f"{block}.{path}", {"query_key": heads.size, "value": heads.size})
        width += entry["query_key"] + entry["value"]
    return heads.key * width * checkpoint.dtype.itemsize
