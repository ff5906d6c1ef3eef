"""Write the dense weights that a compressed checkpoint stands for, block by block."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from lowrank_compress.artifacts.directories import files_in, recover, replacing
from lowrank_compress.artifacts.documents import read_sealed, write_sealed
from lowrank_compress.artifacts.hashes import file_hashes
from lowrank_compress.errors import ArtifactError, CheckpointError
from lowrank_compress.model.blueprint import Blueprint
from lowrank_compress.model.checkpoint import Checkpoint
from lowrank_compress.model.export import ShardWriter, write_companions
from lowrank_compress.model.joining import Joining
from lowrank_compress.model.names import stock_names
from lowrank_compress.model.skeleton import Skeleton
from lowrank_compress.model.walk.walk import Walk
from lowrank_compress.shipped.restore import restore_modules

SHARD_BYTES = 1_000_000_000

EXPORT = "lrc-export.json"
"""In an export: the files that it consists of, with their hashes. Only such a directory is ever replaced."""


def write_dense(
    checkpoint: Checkpoint,
    out: Path,
    advance: Callable[[int, int], None] = lambda done, total: None,
    *,
    overwrite: bool = False,
) -> None:
    """Multiply factors out and write a stock checkpoint in the factors' dtype; one block is in memory at a time.

    The directory appears whole or not at all, and what was there stands until then.

    Parameters
    ----------
    overwrite
        Replace an earlier export. What else lies in its directory, or was changed since, is kept there.

    Raises
    ------
    CheckpointError
        The checkpoint is not compressed.
    ArtifactError
        `out` is a file, or holds files and is not to be replaced, or is no export.
    """
    if checkpoint.quantization is None:
        raise CheckpointError(f"{checkpoint.path} is not compressed by this package; there is nothing to make dense.")
    for path, entry in checkpoint.quantization.get("routers", {}).items():
        raise CheckpointError(
            f"{checkpoint.path} cannot be made dense: {path} chooses among {entry['kept']} of {entry['experts']} "
            "experts, and a stock router would choose those that are gone. Compress with --experts camera or nystrom "
            "for a dense export, or use the checkpoint as it is."
        )
    with exporting(out, overwrite) as draft:
        _write(checkpoint, draft, advance)


@contextmanager
def exporting(out: Path, overwrite: bool) -> Iterator[Path]:
    """Give a directory to write an export into; it takes the place `out`, and what was exported there, at the end.

    Raises
    ------
    ArtifactError
        `out` is a file, or holds files and is not to be replaced, or is no export.
    """
    recover(out, exported)
    _refuse_foreign(out, overwrite)
    with replacing(out, exported) as draft:
        yield draft
        files = {name: draft / name for name in files_in(draft)}
        write_sealed(draft / EXPORT, {"schema": 1, "files": file_hashes(files)})


def exported(directory: Path) -> dict[str, str]:
    """Name the files of a directory that are an earlier export, with their hashes; none if it is no export."""
    try:
        files = read_sealed(directory / EXPORT).get("files")
    except ArtifactError:
        return {}
    if not isinstance(files, dict) or not all(isinstance(digest, str) and digest for digest in files.values()):
        return {}
    return {**files, EXPORT: ""}


def _refuse_foreign(out: Path, overwrite: bool) -> None:
    """Refuse what is no directory, and one with files unless it is an export that is to be replaced."""
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise ArtifactError(f"{out} is a file or a link; expected a directory, existing or not.")
    if not out.exists() or not any(out.iterdir()):
        return
    if not overwrite:
        raise ArtifactError(f"{out} is not empty. Choose another directory, or pass --overwrite to replace an export.")
    if not exported(out):
        raise ArtifactError(
            f"{out} is not empty and is no export of this program (or its {EXPORT} was changed); it is not "
            "replaced. Choose another directory."
        )


def _on_disk(plan: Blueprint, name: str) -> str:
    """Name a dense tensor as the original would, also where a packed one is stored in its place."""
    packed = f"{name}_packed"
    return plan.name_on_disk(packed).removesuffix("_packed") if packed in plan.stored else plan.name_on_disk(name)


def _write(checkpoint: Checkpoint, out: Path, advance: Callable[[int, int], None]) -> None:
    skeleton = Skeleton(checkpoint, torch.device("cpu"), checkpoint.dtype)
    plan = skeleton.blueprint
    writer = ShardWriter(out, SHARD_BYTES)
    restored, experts = skeleton.restored_outside(), Joining(plan.model, stock_names(plan.model))
    factored = {name.rpartition(".")[0] for name in restored}
    for name in plan.outside():
        if not name.startswith(tuple(f"{path}." for path in factored)):
            writer.add(plan.name_on_disk(name), plan.read(name))
    for name, tensor in restored.items():
        path, _, leaf = name.rpartition(".")
        # Under the name that the dense checkpoint has: that of the factors or codes, but for their leaves.
        inner = next((leaf for leaf in ("lr_in.weight", "weight_packed") if f"{path}.{leaf}" in plan.stored), "weight")
        writer.add(f"{plan.name_on_disk(f'{path}.{inner}').removesuffix(inner)}{leaf}", tensor)
    for step in Walk([skeleton]).forwards():
        (block,), prefix = step.blocks, plan.resolved.blocks[step.index]
        made = {f"{prefix}.{path}" for path in restore_modules(block)}
        for leaf, tensor in block.state_dict().items():
            name = f"{prefix}.{leaf}"
            # What compression left alone is written in the dtype it is stored in.
            untouched = name.rpartition(".")[0] not in made
            found = plan.read(name) if untouched else tensor
            for stored in experts.add(name, found) if name in experts else [(_on_disk(plan, name), found)]:
                writer.add(*stored)
        advance(step.index + 1, len(plan.resolved.blocks))
    writer.close()
    dropped = ("quantization_config", "auto_map")
    settings = {name: value for name, value in checkpoint.raw_config.items() if name not in dropped}
    text = json.dumps(settings, indent=2) + "\n"
    (out / "config.json").write_text(text, encoding="utf-8")
    write_companions(checkpoint, out)
