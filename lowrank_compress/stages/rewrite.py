"""Write a compressed checkpoint with other values in the same layout."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lowrank_compress.artifacts.documents import read_json, write_json
from lowrank_compress.artifacts.files import sha256, write_text
from lowrank_compress.errors import CheckpointError
from lowrank_compress.model.blueprint import blueprint
from lowrank_compress.model.checkpoint import Checkpoint
from lowrank_compress.model.export import ShardWriter, config_json, write_companions
from lowrank_compress.model.joining import Joining
from lowrank_compress.shipped.saving import remote_code_entries, write_remote_code
from lowrank_compress.stages.card import model_card
from lowrank_compress.stages.identity import checkpoint_id
from lowrank_compress.stages.origin import CARD, copy_licences
from lowrank_compress.stages.report import REPORT, facts


def contents_of(checkpoint: Checkpoint) -> dict[str, str]:
    """Identify all of a compressed checkpoint that goes into another one: its tensors and config, and its report."""
    found = {"checkpoint": checkpoint_id(checkpoint)}
    if (report := checkpoint.path / REPORT).exists():
        found["report"] = sha256(report)
    return found


def refuse_packed(checkpoint: Checkpoint, command: str) -> None:
    """Refuse a quantized checkpoint, whose weights cannot be changed any more.

    Raises
    ------
    CheckpointError
        It is one.
    """
    if ((checkpoint.quantization or {}).get("factor_quantization") or {}).get("linears"):
        after = "" if command == "quantize" else f", and quantize the result of `lrc {command}`"
        raise CheckpointError(
            f"{checkpoint.path} is quantized, which comes last: `lrc {command}` cannot change its weights. Name the "
            f"checkpoint that it was quantized from{after}."
        )


def rewrite(
    checkpoint: Checkpoint,
    out: Path,
    tensors: Callable[[int, str], Tensor],
    *,
    dtype: str,
    shard_bytes: int,
    report: Callable[[Mapping[str, Any]], Mapping[str, Any]],
    advance: Callable[[int, int], None],
) -> dict[str, Any]:
    """Write a checkpoint that differs from another in its tensors alone.

    Parameters
    ----------
    checkpoint
        The other one.
    out
        An empty directory.
    tensors
        Gives the tensor of a name in the model, of a block or of what is outside (-1), as it is to be stored.
    dtype
        What config.json is to say.
    shard_bytes
        The most bytes of a shard.
    report
        Makes lowrank.json of that of the other one, where that has one: what transformers has saved has none.
    advance
        Called with the blocks that are done, and all.

    Returns
    -------
    dict
        What a manifest is to report of it.
    """
    plan = blueprint(checkpoint)

    def named(block: int) -> Iterator[tuple[str, Tensor]]:
        for name in plan.outside() if block < 0 else plan.inside(block):
            yield name, tensors(block, name)

    return write_anew(
        checkpoint,
        out,
        named,
        checkpoint.quantization or {},
        dtype=dtype,
        shard_bytes=shard_bytes,
        report=report,
        advance=advance,
    )


def write_anew(
    checkpoint: Checkpoint,
    out: Path,
    tensors: Callable[[int], Iterable[tuple[str, Tensor]]],
    layout: Mapping[str, Any],
    more: Callable[[int], Mapping[str, Tensor]] = lambda block: {},
    *,
    dtype: str,
    shard_bytes: int,
    report: Callable[[Mapping[str, Any]], Mapping[str, Any]],
    advance: Callable[[int, int], None],
) -> dict[str, Any]:
    """Write a checkpoint of the same model as another one, in a layout of its own.

    Parameters
    ----------
    checkpoint, out, dtype, shard_bytes, report, advance
        As for `rewrite`.
    tensors
        Gives names in the other one's model, and the tensors, of a block or of what is outside (-1).
    layout
        What `LowRankConfig` is to say.
    more
        Gives further tensors by their names on disk.

    Returns
    -------
    dict
        What a manifest is to report of it.
    """
    plan = blueprint(checkpoint)
    plan.check_ties()
    writer = ShardWriter(out, shard_bytes)
    pieces = Joining(plan.model, {name: plan.name_on_disk(name) for name in plan.pieces})
    count = len(plan.resolved.blocks)
    for block in range(-1, count):
        for name, tensor in tensors(block):
            for stored in pieces.add(name, tensor) if name in pieces else [(plan.name_on_disk(name), tensor)]:
                writer.add(*stored)
        for stored in more(block).items():
            writer.add(*stored)
        advance(block + 1, count)
    shards = writer.close()
    write_json(out / "config.json", config_json(checkpoint, dtype, layout, remote_code_entries(plan.model.config)))
    write_remote_code(out)
    write_companions(checkpoint, out)
    found: dict[str, Any] = {"shards": len(shards)}
    if (checkpoint.path / REPORT).exists():
        made = report(read_json(checkpoint.path / REPORT))
        write_json(out / REPORT, made)
        copy_licences(checkpoint, made, out)
        write_text(out / CARD, model_card(made))
        found = facts(made) | found
    return found
