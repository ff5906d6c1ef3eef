"""Write the dense weights that a compressed checkpoint stands for, block by block."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from transformers.pytorch_utils import Conv1D

from lowrank_compress.errors import CheckpointError
from lowrank_compress.model.checkpoint import Checkpoint
from lowrank_compress.model.export import ShardWriter, outside_tensors, write_companions
from lowrank_compress.model.layers import CompressedLinear
from lowrank_compress.model.skeleton import Skeleton, meta_model

SHARD_BYTES = 1_000_000_000


def write_dense(
    checkpoint: Checkpoint, out: Path, advance: Callable[[int, int], None] = lambda done, total: None
) -> None:
    """Multiply factors out and write a stock checkpoint in the factors' dtype; one block is in memory at a time.

    The directory appears whole or not at all.

    Raises
    ------
    CheckpointError
        The checkpoint is not compressed.
    """
    if (checkpoint.raw_config.get("quantization_config") or {}).get("quant_method") != "lowrank":
        raise CheckpointError(f"{checkpoint.path} is not compressed by this package; there is nothing to make dense.")
    draft = out.with_name(out.name + ".partial")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        _write(checkpoint, draft, advance)
        if out.exists():
            out.rmdir()
        draft.rename(out)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def _write(checkpoint: Checkpoint, out: Path, advance: Callable[[int, int], None]) -> None:
    model, resolved = meta_model(checkpoint)
    writer = ShardWriter(out, SHARD_BYTES)
    for name, read in outside_tensors(checkpoint, model, resolved, checkpoint.dtype).items():
        writer.add(name, read())
    skeleton = Skeleton(checkpoint, torch.device("cpu"), checkpoint.dtype)
    stock = {name for name in model.state_dict()}
    for index, prefix in enumerate(resolved.blocks):
        with skeleton.block(index) as block:
            for path, module in block.named_modules():
                if isinstance(module, CompressedLinear):
                    weight = module.dense_weight(checkpoint.dtype)
                    dense = model.get_submodule(f"{prefix}.{path}")
                    writer.add(f"{prefix}.{path}.weight", weight.T if isinstance(dense, Conv1D) else weight)
            for name, tensor in block.state_dict().items():
                compressed = name.endswith(".weight") and tensor.numel() == 0
                if f"{prefix}.{name}" in stock and not compressed:
                    writer.add(f"{prefix}.{name}", tensor)
        advance(index + 1, len(resolved.blocks))
    writer.close()
    dropped = ("quantization_config", "auto_map")
    settings = {name: value for name, value in checkpoint.raw_config.items() if name not in dropped}
    text = json.dumps(settings, indent=2, sort_keys=True) + "\n"
    (out / "config.json").write_text(text, encoding="utf-8")
    write_companions(checkpoint, out)
