"""Write Hugging Face checkpoints, a shard at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from lowrank_compress.artifacts.stream import Lazy, at_hand, write_tensors
from lowrank_compress.model.casting import require_finite
from lowrank_compress.model.checkpoint import Checkpoint
from lowrank_compress.model.shards import INDEX, SINGLE
from lowrank_compress.shipped.config import LowRankConfig


class ShardWriter:
    """Collects tensors and writes them as safetensors shards of at most `limit` bytes each.

    One that is given lazily is in memory only while it is written.

    Parameters
    ----------
    directory
        An empty directory.
    limit
        Bytes a shard; a tensor that is larger has one of its own.
    """

    def __init__(self, directory: Path, limit: int) -> None:
        self.directory, self.limit = directory, limit
        self._pending: dict[str, Lazy] = {}
        self._names: set[str] = set()
        self._bytes = 0
        self._shards: list[list[str]] = []
        self._total = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Add a tensor; those added before may go to disk.

        Raises
        ------
        NumericsError
            It has NaN or infinite elements.
        """
        require_finite(tensor, name)
        self._add(name, at_hand(tensor.detach().cpu().contiguous()))

    def later(self, name: str, tensor: Lazy) -> None:
        """Add a tensor that is read when its shard is written, and refused then; see `add`."""

        def read() -> Tensor:
            require_finite(found := tensor.read(), name)
            return found

        self._add(name, replace(tensor, read=read))

    def _add(self, name: str, tensor: Lazy) -> None:
        assert name not in self._names, f"{name} is written twice"
        self._names.add(name)
        if self._pending and self._bytes + tensor.bytes > self.limit:
            self._flush()
        self._pending[name] = tensor
        self._bytes += tensor.bytes
        self._total += tensor.bytes

    def _flush(self) -> None:
        # The number of shards is known only at the end: names are given then.
        write_tensors(self.directory / _draft(len(self._shards)), self._pending, {"format": "pt"})
        self._shards.append(list(self._pending))
        self._pending, self._bytes = {}, 0

    def close(self) -> list[str]:
        """Write what is left, name the shards and write the index; return the shards' names."""
        if self._pending:
            self._flush()
        count = len(self._shards)
        names = [SINGLE] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        for number, name in enumerate(names):
            # safetensors makes files that nobody else can read; who may enter the directory may read what is in it.
            (self.directory / _draft(number)).chmod(self.directory.stat().st_mode & 0o664)
            (self.directory / _draft(number)).rename(self.directory / name)
        if count > 1:
            index = {
                "metadata": {"total_size": self._total},
                "weight_map": {key: name for name, keys in zip(names, self._shards, strict=True) for key in keys},
            }
            text = json.dumps(index, indent=2, sort_keys=True) + "\n"
            (self.directory / INDEX).write_text(text, encoding="utf-8")
        return names


def _draft(number: int) -> str:
    return f"draft-{number:05d}.safetensors"


def config_json(
    checkpoint: Checkpoint, dtype: str, layout: Mapping[str, Any], auto_map: Mapping[str, str]
) -> dict[str, Any]:
    """Make the compressed checkpoint's config.json from the dense one's.

    Parameters
    ----------
    layout
        ``modules``, ``dense_shapes``, ``attention``, ``experts``, ``routers`` and ``merged`` of `LowRankConfig`.
    """
    settings = {name: value for name, value in checkpoint.raw_config.items() if name not in ("torch_dtype", "auto_map")}
    return settings | {
        "dtype": dtype,
        "auto_map": dict(auto_map),
        "quantization_config": LowRankConfig(**layout).to_dict(),
    }


def write_companions(checkpoint: Checkpoint, directory: Path) -> None:
    """Copy tokenizer, generation config, chat template, and what sentence-transformers has."""
    for path in checkpoint.companions():
        place = directory / path.relative_to(checkpoint.path)
        place.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, place)
