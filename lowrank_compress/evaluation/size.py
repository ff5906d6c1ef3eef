"""How large a checkpoint is: parameters and bytes, blocks and whole model, KV cache."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from lowrank_compress.model.blueprint import blueprint, task_of
from lowrank_compress.model.checkpoint import Checkpoint


@dataclass(frozen=True)
class Size:
    """Elements and bytes, of what is stored.

    Attributes
    ----------
    blocks
        Elements stored for the claimed weights inside the blocks (factors, coefficients and indices included).
    model
        Elements of the whole model; tied tensors count once.
    bytes
        Bytes of these tensors on disk.
    kv_bytes_per_token
        Bytes that one token adds to the key-value cache, in the checkpoint's dtype; 0 for a model without one.
    """

    blocks: int
    model: int
    bytes: int
    kv_bytes_per_token: int


def measure_size(checkpoint: Checkpoint) -> Size:
    """Count from the headers of the files; no tensor is read."""
    plan = blueprint(checkpoint)
    claimed = tuple(f"{path}." for path in plan.resolved.modules())
    names = plan.outside() + [name for block in range(len(plan.resolved.blocks)) for name in plan.inside(block)]
    blocks = elements = total = 0
    for name in names:
        shape, size = checkpoint.stored(plan.name_on_disk(name))
        count = math.prod(shape)
        elements += count
        total += size
        if name.startswith(claimed) and not name.endswith(".bias"):
            blocks += count
    return Size(blocks, elements, total, kv_bytes(checkpoint))


def kv_bytes(checkpoint: Checkpoint) -> int:
    """Bytes that one token adds to the key-value cache."""
    config: Any = checkpoint.config
    if task_of(config) != "lm":
        return 0
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * width * checkpoint.dtype.itemsize
