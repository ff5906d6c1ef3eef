"""How large a checkpoint is: parameters and bytes, blocks and whole model, KV cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lowrank_compress.model.checkpoint import Checkpoint
from lowrank_compress.model.skeleton import meta_model, task_of


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
        Bytes of all tensors in the checkpoint's files.
    kv_bytes_per_token
        Bytes that one token adds to the key-value cache, in the checkpoint's dtype; 0 for a model without one.
    """

    blocks: int
    model: int
    bytes: int
    kv_bytes_per_token: int


def measure_size(checkpoint: Checkpoint) -> Size:
    """Count from the headers of the files; no tensor is read."""
    model, resolved = meta_model(checkpoint)
    prefix = model.base_model_prefix
    claimed_modules = tuple(f"{path}." for path in resolved.modules())
    names = set(model.state_dict())
    blocks = elements = total = 0
    for stored in checkpoint.files:
        shape, size = checkpoint.stored(stored)
        count = 1
        for dimension in shape:
            count *= dimension
        name = next(
            (name for name in (stored, f"{prefix}.{stored}", stored.removeprefix(f"{prefix}.")) if name in names),
            stored,
        )
        claimed = stored.startswith(claimed_modules) or f"{prefix}.{stored}".startswith(claimed_modules)
        if name not in names and not claimed:
            legacy = checkpoint.raw_config.get("quantization_config") is None and not stored.endswith(
                (".gamma", ".beta")
            )
            if legacy:
                continue  # a buffer that old checkpoints carry
        if name in (getattr(model, "all_tied_weights_keys", {}) or {}):
            continue
        elements += count
        total += size
        if claimed and not stored.endswith(".bias"):
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
