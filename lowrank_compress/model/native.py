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
from lowrank_compress.arch.table import EXPERT_COUNTS
from lowrank_compress.errors import CheckpointError
from lowrank_compress.model.blueprint import blueprint
from lowrank_compress.model.checkpoint import Checkpoint
from lowrank_compress.model.dense import SHARD_BYTES, exporting
from lowrank_compress.model.export import ShardWriter, write_companions
from lowrank_compress.model.joining import Joining
from lowrank_compress.model.names import experts_of, stock_names
from lowrank_compress.model.shards import INDEX
from lowrank_compress.model.surgery import KEPT
from lowrank_compress.shipped.fusion import FUSED

# What the families' configs call the width of an MLP, or of each expert.
WIDTHS = ("moe_intermediate_size", "intermediate_size", "ffn_dim", "n_inner", "hidden_dim")
HOW = (
    "Compress with --method nystrom --attention dense --allocate equal-widths for a native export, or "
    "export with --dense, at the original's size: all can but those whose routers know fewer experts."
)
HOW_COUNTS = (
    "Compress with --experts reap --allocate uniform, which keeps as many in every block; or use the checkpoint as it "
    "is."
)
HOW_MERGED = (
    "Compress with --experts reap --allocate uniform for fewer experts, or with --experts nystrom --allocate "
    "equal-widths for narrower ones; or export with --dense, at the original's size."
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
    settings, stock = native_form(checkpoint)
    with exporting(out, overwrite) as draft:
        if (checkpoint.quantization or {}).get("experts"):
            _write_renamed(checkpoint, stock, draft)
        else:
            for path in sorted({*checkpoint.files.values(), checkpoint.path / INDEX}):
                if path.exists():
                    shutil.copyfile(path, draft / path.name)
        (draft / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        write_companions(checkpoint, draft)


def _write_renamed(checkpoint: Checkpoint, stock: Any, draft: Path) -> None:
    """Write the tensors, those of experts under the names that stock checkpoints have for them."""
    plan = blueprint(checkpoint)
    names = {stored: name for name, stored in plan.stored.items() if name not in plan.pieces}
    experts, writer = Joining(stock, stock_names(stock)), ShardWriter(draft, SHARD_BYTES)
    numbers = _numbers(checkpoint, plan.model)
    for stored, header in checkpoint.tensors.items():
        if stored.endswith(tuple(f".experts.{leaf}" for leaf in FUSED)) and not header.elements:
            continue
        name = _renumbered(names.get(stored, stored), numbers)
        if name is not None:
            tensor = checkpoint.read(stored)
            for found in experts.add(name, tensor) if name in experts else [(stored, tensor)]:
                writer.add(*found)
    writer.close()


def _numbers(checkpoint: Checkpoint, model: nn.Module) -> dict[str, dict[int, int]]:
    """Path of experts whose router knows fewer of them -> number of each that is left -> its new number.

    Raises
    ------
    CheckpointError
        Blocks have not as many each, which a stock config would have to say.
    """
    routers: Mapping[str, Any] = (checkpoint.quantization or {}).get("routers") or {}
    stored, paths = blueprint(checkpoint).stored, experts_of(model)
    counts = {path: entry["kept"] for path, entry in routers.items()}
    if counts and (len(counts) < len(paths) or len(set(counts.values())) > 1):
        said = ", ".join(f"{count} in {path}" for path, count in list(counts.items())[:4])
        raise CheckpointError(
            f"{checkpoint.path} is no stock model: its blocks have not as many experts each ({said}"
            f"{' …' if len(counts) > 4 else ''}), and a config says one number for all. {HOW_COUNTS}"
        )
    found = {}
    for path in routers:
        kept = checkpoint.read(stored[f"{path}.{KEPT}"]).tolist()
        (home,) = (each for each in paths if each.rpartition(".")[0] == path.rpartition(".")[0])
        found[home] = {number: new for new, number in enumerate(kept)}
    return found


def _renumbered(name: str, numbers: Mapping[str, Mapping[int, int]]) -> str | None:
    """Return the name of a tensor where experts that are gone are not counted; None for what goes with them."""
    for path, new in numbers.items():
        if name.startswith(f"{path}."):
            number, dot, leaf = name.removeprefix(f"{path}.").partition(".")
            if dot and number.isdecimal():
                return f"{path}.{new[int(number)]}.{leaf}" if int(number) in new else None
    return None if numbers and name.endswith(f".{KEPT}") else name


def native_form(checkpoint: Checkpoint) -> tuple[dict[str, Any], nn.Module]:
    """Make the stock config.json that describes a compressed checkpoint's shapes, and a stock model of it.

    The model is on the meta device, its experts are separate.

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
        ("modules", "is stored as factors", HOW),
        ("attention", "has narrower heads", HOW),
        ("merged", "has experts that stand for others", HOW_MERGED),
    )
    for entries, what, how in kinds:
        if found.get(entries):
            name, entry = next(iter(found[entries].items()))
            what = "caches a latent" if isinstance(entry, Mapping) and "latent" in entry else what
            raise CheckpointError(
                f"{checkpoint.path} is no stock model: {name} {what}, which no config of transformers describes; "
                f"expected plain matrices, and MLPs of one width. {how}"
            )
    model = blueprint(checkpoint).model
    numbers = _numbers(checkpoint, model)
    renamed = ((_renumbered(name, numbers), shape) for name, shape in _shapes(model).items())
    shapes = {name: shape for name, shape in renamed if name is not None}
    settings = {
        name: value for name, value in checkpoint.raw_config.items() if name not in ("quantization_config", "auto_map")
    }
    smaller = [
        {shape[0] // (shape[2:] or [1])[0], shape[1]}
        for path, shape in found.get("dense_shapes", {}).items()
        if _renumbered(f"{path}.weight", numbers) is not None
    ]
    stock = copy.deepcopy(model.config)
    stock.__dict__.pop("quantization_config", None)
    stock.__dict__.pop("auto_map", None)
    known, fewer = stock.to_dict(), dict[str, int]()
    for kept in numbers.values():
        # Under the name that config.json has for it; transformers may have another.
        fewer = {next(key for key in EXPERT_COUNTS if key in settings): len(kept)}
    for key in (name for name in WIDTHS if name in known):
        for width in sorted(set.intersection(*smaller)) if smaller else [known[key]]:
            changed = fewer | ({key: width} if smaller else {})
            made = _built(type(model), stock, changed)
            if _shapes(made) == shapes:
                _require_even(checkpoint, model, width if smaller else 0)
                return settings | changed, made
    widths = sorted({min(one) for one in smaller} | {max(one) for one in smaller})
    raise CheckpointError(
        f"{checkpoint.path} is no stock model: its blocks are not alike (their matrices have sides of "
        f"{', '.join(map(str, widths[:8]))}{' …' if len(widths) > 8 else ''}), and a config says one width for all. "
        f"{HOW}"
    )


def _require_even(checkpoint: Checkpoint, model: nn.Module, width: int) -> None:
    """Refuse experts whose rows transformers, which multiplies those of all experts at once, would stumble over."""
    multiple = 16 // checkpoint.dtype.itemsize
    if experts_of(model) and width % multiple:
        raise CheckpointError(
            f"{checkpoint.path} would be no stock model that runs: its experts are {width} wide, and transformers' "
            f"product of all experts at once (grouped_mm) takes rows of a multiple of 16 bytes. Compress with "
            f"--round-to {multiple}."
        )


def _built(kind: Any, config: Any, changed: Mapping[str, int]) -> nn.Module:
    with torch.device("meta"):
        smaller = copy.deepcopy(config)
        for key, value in changed.items():
            setattr(smaller, key, value)
        model = kind._from_config(smaller)
    separate_experts(model)
    return model


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    marks = {f"{path}.{leaf}" for path in experts_of(model) for leaf in FUSED}
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in marks}
