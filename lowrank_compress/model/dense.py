"""Write the dense weights that a compressed checkpoint stands for, block by block."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from lowrank_compress.errors import CheckpointError
from lowrank_compress.model.checkpoint import Checkpoint
from lowrank_compress.model.export import ShardWriter, write_companions
from lowrank_compress.model.layers import restore_modules
from lowrank_compress.model.skeleton import Skeleton

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
    skeleton = Skeleton(checkpoint, torch.device("cpu"), checkpoint.dtype)
    plan = skeleton.blueprint
    writer = ShardWriter(out, SHARD_BYTES)
    for name in plan.outside():
        writer.add(plan.name_on_disk(name), plan.read(name))
    for index, prefix in enumerate(plan.resolved.blocks):
        with skeleton.block(index) as block:
            made = {f"{prefix}.{path}" for path in restore_modules(block)}
            for leaf, tensor in block.state_dict().items():
                name = f"{prefix}.{leaf}"
                # What compression left alone is written in the dtype it is stored in.
                untouched = name.rpartition(".")[0] not in made
                writer.add(plan.name_on_disk(name), plan.read(name) if untouched else tensor)
        advance(index + 1, len(plan.resolved.blocks))
    writer.close()
    dropped = ("quantization_config", "auto_map")
    settings = {name: value for name, value in checkpoint.raw_config.items() if name not in dropped}
    text = json.dumps(settings, indent=2) + "\n"
    (out / "config.json").write_text(text, encoding="utf-8")
    write_companions(checkpoint, out)
