"""Write a compressed checkpoint whose blocks all have one shape as a stock one of that shape."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowrank_compress.arch.resolve import separate_experts
from lowrank_compress.errors import CheckpointError
from lowrank_compress.model.blueprint import blueprint
from lowrank_compress.model.checkpoint import Checkpoint
from lowrank_compress.model.dense import SHARD_BYTES, exporting
from lowrank_compress.model.export import ShardWriter, write_companions
from lowrank_compress.model.joining import Joining
from lowrank_compress.model.names import experts_of, stock_names
from lowrank_compress.model.shards import INDEX
from lowrank_compress.shipped.fusion import FUSED

# What the families' configs call the width of an MLP, or of each expert.
WIDTHS = ("moe_intermediate_size", "intermediate_size", "ffn_dim", "n_inner", "hidden_dim")
HOW = (
    "Compress with --method nystrom --attention dense --allocate equal-widths for a native export, or "
    "export with --dense, at the original's size: all can but those whose routers know fewer experts."
)


def write_native(checkpoint: Checkpoint, out: Path, *, overwrite: bool = False) -> None:
    """Copy the tensors as they are, experts under stock names, beside a config that is the stock one of their shapes.

    The result needs nothing of this package, and runs at its smaller size wherever the family runs. The directory
    appears whole or not at all.

    Parameters
    ----------
    overwrite
        Replace an earlier export. What else lies in its directory, or was changed since, is kept there.

    Raises
    ------
    CheckpointError
        The checkpoint is not compressed, or no stock config describes it.
    ArtifactError
        `out` is a file, or holds files and is not to be replaced, or is no export.
    """
    if checkpoint.quantization is None:
        raise CheckpointError(f"{checkpoint.path} is not compressed by this package; it is native already.")
    settings = native_config(checkpoint)
    with exporting(out, overwrite) as draft:
        if (checkpoint.quantization or {}).get("experts"):
            _write_renamed(checkpoint, draft)
        else:
            for path in sorted({*checkpoint.files.values(), checkpoint.path / INDEX}):
                if path.exists():
                    shutil.copyfile(path, draft / path.name)
        (draft / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        write_companions(checkpoint, draft)


def _write_renamed(checkpoint: Checkpoint, draft: Path) -> None:
    """Write the tensors, those of experts under the names that stock checkpoints have for them."""
    plan = blueprint(checkpoint)
    names = {stored: name for name, stored in plan.stored.items() if name not in plan.pieces}
    experts, writer = Joining(plan.model, stock_names(plan.model)), ShardWriter(draft, SHARD_BYTES)
    for stored, header in checkpoint.tensors.items():
        if stored.endswith(tuple(f".experts.{leaf}" for leaf in FUSED)) and not header.elements:
            continue
        name, tensor = names.get(stored, stored), checkpoint.read(stored)
        for found in experts.add(name, tensor) if name in experts else [(stored, tensor)]:
            writer.add(*found)
    writer.close()


def native_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """Make the stock config.json that describes a compressed checkpoint's shapes; a stock model of it has been built.

    Raises
    ------
    CheckpointError
        There is none, for the reason that is named.
    """
    found: Mapping[str, Any] = checkpoint.quantization or {}
    if packed := (found.get("factor_quantization") or {}).get("linears"):
        raise CheckpointError(
            f"{checkpoint.path} is no stock model: {next(iter(packed))} is quantized. Export what it was quantized "
            "from, and quantize that: `lrc quantize` of a stock checkpoint writes one that compressed-tensors loads."
        )
    kinds = (
        ("modules", "is stored as factors"),
        ("attention", "has narrower heads"),
        ("routers", "chooses among fewer experts than it numbers"),
        ("merged", "has experts that stand for others"),
    )
    for entries, what in kinds:
        if found.get(entries):
            name, entry = next(iter(found[entries].items()))
            what = "caches a latent" if isinstance(entry, Mapping) and "latent" in entry else what
            raise CheckpointError(
                f"{checkpoint.path} is no stock model: {name} {what}, which no config of transformers describes; "
                f"expected plain matrices, and MLPs of one width. {HOW}"
            )
    model = blueprint(checkpoint).model
    shapes = _shapes(model)
    settings = {
        name: value for name, value in checkpoint.raw_config.items() if name not in ("quantization_config", "auto_map")
    }
    smaller = [{shape[0] // (shape[2:] or [1])[0], shape[1]} for shape in found.get("dense_shapes", {}).values()]
    stock = copy.deepcopy(model.config)
    stock.__dict__.pop("quantization_config", None)
    stock.__dict__.pop("auto_map", None)
    known = stock.to_dict()
    for key in (name for name in WIDTHS if name in known):
        for width in sorted(set.intersection(*smaller)) if smaller else [known[key]]:
            if _shapes(_built(type(model), stock, key, width)) == shapes:
                return settings | ({key: width} if smaller else {})
    widths = sorted({min(one) for one in smaller} | {max(one) for one in smaller})
    raise CheckpointError(
        f"{checkpoint.path} is no stock model: its blocks are not alike (their matrices have sides of "
        f"{', '.join(map(str, widths[:8]))}{' …' if len(widths) > 8 else ''}), and a config says one width for all. "
        f"{HOW}"
    )


def _built(kind: Any, config: Any, key: str, width: int) -> nn.Module:
    with torch.device("meta"):
        narrower = copy.deepcopy(config)
        setattr(narrower, key, width)
        model = kind._from_config(narrower)
    separate_experts(model)
    return model


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    marks = {f"{path}.{leaf}" for path in experts_of(model) for leaf in FUSED}
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in marks}
