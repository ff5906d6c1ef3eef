"""Per-block tensor files: the finished pieces from which a stage resumes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lowrank_compress.artifacts.directories import keep_aside, refuse_link
from lowrank_compress.artifacts.documents import canonical_hash, parse_json
from lowrank_compress.artifacts.files import is_regular, sweep, write_atomically
from lowrank_compress.artifacts.stream import DTYPES, Lazy, at_hand, write_tensors
from lowrank_compress.errors import ArtifactError

# What was read of an open file counts as memory of this process until the file is opened anew.
_MAPPED = 64 << 20


class BlockFiles:
    """A folder of one safetensors file a block, each marked with the id of the result it belongs to.

    A file carries in its header a SHA-256 over its tensors, notes, id and number, so that a rerun can tell a
    finished block of this very result from a damaged one. Its name holds the beginning of the id: the files of another
    result stand beside it until the manifest of the new one is written.

    Parameters
    ----------
    directory
        Where the files lie.
    id
        Identity of the result, usually a stage's id.
    prefix
        First part of the file names.
    """

    def __init__(self, directory: Path, id: str, prefix: str = "block") -> None:
        self.directory = directory
        self.id = id
        self.prefix = prefix
        self._verified: dict[int, tuple[int, ...]] = {}

    def name(self, block: int) -> str:
        """File name of a block."""
        return f"{self.prefix}-{self.id[:8]}-{block:04d}.safetensors"

    def path(self, block: int) -> Path:
        """Path of a block's file."""
        return self.directory / self.name(block)

    def write(self, block: int, tensors: Mapping[str, Tensor | Lazy], notes: Mapping[str, Any] | None = None) -> None:
        """Write a finished block, with JSON notes in its header; it appears whole or not at all.

        Tensors that are given lazily are read one by one, twice each.
        """
        lazy = {
            name: tensor if isinstance(tensor, Lazy) else at_hand(tensor.detach().cpu())
            for name, tensor in sorted(tensors.items())
        }
        refuse_link(self.directory)
        # One metadata key only: safetensors does not keep the order of several, and bytes must repeat.
        said = {"block": block, "id": self.id, "notes": dict(notes or {})}
        digest = _digest(((name, each.read()) for name, each in lazy.items()), said)
        header = {"lrc": json.dumps(said | {"digest": digest}, sort_keys=True)}
        if self._header(block) is None:
            keep_aside(self.path(block))  # nothing of ours
        write_atomically(self.path(block), lambda path: write_tensors(path, lazy, header))
        self._verified[block] = self._stamp(block)

    def finished(self, block: int) -> bool:
        """Tell whether a block of this result is on disk with the bytes it was written with.

        A file is hashed once, and again only if its size or time has changed.
        """
        header = self._header(block)
        if header is None or header.get("id") != self.id:
            return False
        stamp = self._stamp(block)
        if self._verified.get(block) != stamp:
            try:
                digest = _digest(self._tensors(block), {"block": block, "id": self.id, "notes": header.get("notes")})
            except (SafetensorError, ValueError):
                return False
            if digest != header.get("digest"):
                return False
            self._verified[block] = stamp
        return True

    def _stamp(self, block: int) -> tuple[int, ...]:
        stat = self.path(block).stat()
        return stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns

    def notes(self, block: int) -> dict[str, Any]:
        """Read the notes of a block that `read` accepts."""
        return (self._header(block) or {}).get("notes", {})

    def shapes(self, block: int) -> dict[str, list[int]]:
        """Read the shapes of a block's tensors, by name.

        Raises
        ------
        ArtifactError
            The file is missing or damaged.
        """
        if self._header(block) is None:
            raise ArtifactError(f"{self.path(block)} is missing or damaged. Repeat the stage that writes it.")
        with safe_open(self.path(block), framework="pt") as handle:
            return {name: handle.get_slice(name).get_shape() for name in sorted(handle.keys())}

    def remove(self, blocks: Iterable[int]) -> None:
        """Remove the finished files of blocks, and the directory if nothing is left in it."""
        for block in blocks:
            if self.finished(block):
                self.path(block).unlink()
        sweep(self.directory)
        if self.directory.is_dir() and not any(self.directory.iterdir()):
            self.directory.rmdir()

    def _header(self, block: int) -> dict[str, Any] | None:
        if self.path(block).is_symlink() or not is_regular(self.path(block)):
            return None
        try:
            with safe_open(self.path(block), framework="pt") as handle:
                found = parse_json((handle.metadata() or {})["lrc"])
        except (OSError, SafetensorError, ValueError, KeyError):
            return None
        return found if isinstance(found, dict) else None

    def read(self, block: int, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, Tensor]:
        """Read a block, or of its tensors those with `wanted` names; see `each`."""
        return dict(self.each(block, wanted))

    def lazily(self, block: int) -> dict[str, Lazy]:
        """Have the tensors of a block read one by one, each when it is needed; see `each`."""
        self.each(block)

        def read(name: str) -> Tensor:
            with safe_open(self.path(block), framework="pt") as handle:
                return handle.get_tensor(name)

        with safe_open(self.path(block), framework="pt") as handle:
            slices = {name: handle.get_slice(name) for name in sorted(handle.keys())}
            return {
                name: Lazy(tuple(found.get_shape()), DTYPES[found.get_dtype()], partial(read, name))
                for name, found in slices.items()
            }

    def each(self, block: int, wanted: Callable[[str], bool] = lambda name: True) -> Iterator[tuple[str, Tensor]]:
        """Read the tensors of a block one by one, in the order of their names.

        Raises
        ------
        ArtifactError
            The file is missing, damaged or of another result.
        """
        header = self._header(block)
        if header is None:
            raise ArtifactError(f"{self.path(block)} is missing or damaged. Repeat the stage that writes it.")
        if header.get("id") != self.id:
            raise ArtifactError(
                f"{self.path(block)} belongs to another result ({header.get('id')}; expected {self.id}). "
                "Repeat the stage that writes it."
            )
        if not self.finished(block):
            raise ArtifactError(
                f"{self.path(block)} is not as it was written. Repeat the stage that writes it, with --overwrite."
            )
        return self._tensors(block, wanted)

    def _tensors(self, block: int, wanted: Callable[[str], bool] = lambda name: True) -> Iterator[tuple[str, Tensor]]:
        with safe_open(self.path(block), framework="pt") as handle:
            names = [name for name in sorted(handle.keys()) if wanted(name)]
        while names:
            read = 0
            with safe_open(self.path(block), framework="pt") as handle:
                while names and read < _MAPPED:
                    tensor = handle.get_tensor(name := names.pop(0))
                    read += tensor.nbytes
                    yield name, tensor


def _digest(tensors: Iterable[tuple[str, Tensor]], said: Mapping[str, Any]) -> str:
    """Hash a block's tensors, in the order of their names, and what its header says."""
    digest = hashlib.sha256(canonical_hash(said).encode())
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data if tensor.numel() else b"")
    return digest.hexdigest()
