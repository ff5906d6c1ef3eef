"""How large a checkpoint is: parameters and bytes, blocks and whole model, KV cache."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lowrank_compress.arch.targets import Target
from lowrank_compress.model.blueprint import Blueprint, blueprint
from lowrank_compress.model.checkpoint import Checkpoint
from lowrank_compress.model.surgery import KEPT, LATENT, LEADS, REBUILD, ROTARY

# Tokens of a sequence whose cache is counted whole.
CONTEXT = 4096
# Tensors that compressed attentions, routers and experts have beside the stock ones.
OWN = (f".{ROTARY}", f".{LATENT}.weight", f".{REBUILD}.weight", f".{KEPT}", f".{LEADS}")


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
    kv_bytes_4096
        Bytes of the key-value cache of one sequence of 4,096 tokens, with the exact positions of a window.
    """

    blocks: int
    block_bytes: int
    model: int
    bytes: int
    kv_bytes_per_token: int
    kv_bytes_4096: int


def measure_size(checkpoint: Checkpoint) -> Size:
    """Count from the headers of the files; no tensor is read."""
    plan = blueprint(checkpoint)
    claimed = tuple(f"{path}." for path in plan.resolved.modules())
    names = plan.outside() + [name for block in range(len(plan.resolved.blocks)) for name in plan.inside(block)]
    blocks = block_bytes = elements = total = 0
    for name in names:
        shape, size = checkpoint.stored(plan.name_on_disk(name))
        if name in plan.pieces:
            own = tuple(plan.model.get_parameter(name).shape)
            shape, size = own, size * math.prod(own) // math.prod(shape)
        count = _weights_in(plan, name, math.prod(shape))
        elements += count
        total += size
        if (name.startswith(claimed) and not name.endswith(".bias")) or name.endswith(OWN):
            blocks += count
            block_bytes += size
    return Size(blocks, block_bytes, elements, total, kv_bytes(checkpoint), kv_bytes(checkpoint, CONTEXT, window=True))


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


def kv_bytes(checkpoint: Checkpoint, tokens: int = 1, *, window: bool = False, itemsize: int | None = None) -> int:
    """Bytes of the key-value cache of a sequence of so many tokens.

    Parameters
    ----------
    window
        Count also the exact keys and values that are kept of the last tokens, which are as many at any length.
    itemsize
        Bytes of a number; None for those of the checkpoint's dtype.
    """
    plan = blueprint(checkpoint)
    if plan.task != "lm":
        return 0
    heads, path = plan.resolved.heads, plan.resolved.architecture.attention
    settings = checkpoint.quantization or {}
    numbers = 0
    for block in plan.resolved.blocks:
        entry = settings.get("attention", {}).get(f"{block}.{path}", {"query_key": heads.size, "value": heads.size})
        whole = heads.key * (entry["query_key"] + entry["value"])
        latent = entry.get("latent")
        numbers += tokens * (whole if latent is None else latent["rank"])
        if window and latent is not None:
            numbers += max(min(tokens, latent["window"] - 1), 0) * whole
    return numbers * (itemsize or checkpoint.dtype.itemsize)
