"""A checkpoint directory on disk: its config, its tensors by the model's own names, its companion files."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

from lowrank_compress.arch.table import unknown_model_type
from lowrank_compress.errors import CheckpointError, InputError, UnsupportedError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
# Everything beside the weights that makes a checkpoint usable; copied to the compressed one as it is.
COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


def locate(model: str, revision: str | None = None) -> Path:
    """Find a checkpoint: a local directory, or a repository of the Hugging Face hub, downloaded or cached.

    Raises
    ------
    InputError
        It is neither.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise InputError(f"{model} is a file; expected a checkpoint directory (one with config.json) or a hub name.")
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise InputError(f"The directory {model} does not exist; expected a checkpoint directory or a hub name.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.safetensors", INDEX, "config.json", *COMPANIONS]
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as problem:
        raise InputError(
            f"{model!r} is neither a directory here nor a model that could be had from the Hugging Face hub "
            f"({str(problem).strip().splitlines()[0]}). Check the name and revision, log in if it is gated, or pass a "
            "directory."
        ) from problem


@dataclass(frozen=True)
class Checkpoint:
    """A Hugging Face checkpoint directory with safetensors weights.

    Attributes
    ----------
    path
        The directory.
    trust_remote_code
        Whether code shipped in the checkpoint may run.
    """

    path: Path
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if not (self.path / "config.json").exists():
            raise CheckpointError(
                f"{self.path} has no config.json; expected a Hugging Face checkpoint directory "
                "(config.json, *.safetensors, tokenizer files)."
            )

    @cached_property
    def config(self) -> PretrainedConfig:
        """The model's configuration."""
        if self.raw_config.get("model_type") not in CONFIG_MAPPING and "auto_map" not in self.raw_config:
            raise UnsupportedError(unknown_model_type(str(self.raw_config.get("model_type"))))
        try:
            return AutoConfig.from_pretrained(self.path, trust_remote_code=self.trust_remote_code)
        except Exception as problem:  # transformers raises many types here
            kind = self.raw_config.get("model_type")
            raise CheckpointError(
                f"transformers cannot read {self.path / 'config.json'} (model_type {kind!r}): "
                f"{str(problem).strip().splitlines()[0]}"
            ) from problem

    @cached_property
    def raw_config(self) -> dict[str, Any]:
        """config.json as it stands on disk."""
        return _read_json(self.path / "config.json")

    @cached_property
    def files(self) -> dict[str, Path]:
        """Tensor name on disk -> the safetensors file that holds it.

        Raises
        ------
        CheckpointError
            No safetensors, a shard that the index names is missing, or a file is truncated.
        """
        index = self.path / INDEX
        if index.exists():
            weight_map = _read_json(index).get("weight_map", {})
            shards = sorted(set(weight_map.values()))
        elif (self.path / SINGLE).exists():
            shards = [SINGLE]
        else:
            shards = sorted(path.name for path in self.path.glob("*.safetensors"))
        if not shards:
            pickled = sorted(path.name for path in self.path.iterdir() if path.suffix in PICKLED)
            if pickled:
                raise CheckpointError(
                    f"{self.path} has pickled weights only ({', '.join(pickled[:3])}); loading a pickle can run any "
                    "code. Convert it first: load it with transformers where you trust it and `save_pretrained` it, "
                    "which writes safetensors."
                )
            raise CheckpointError(f"{self.path} has no weights; expected {SINGLE} or shards with {INDEX}.")
        found: dict[str, Path] = {}
        for shard in shards:
            with self._open(self.path / shard) as handle:
                found |= dict.fromkeys(handle.keys(), self.path / shard)
        return found

    @staticmethod
    def _open(path: Path):
        try:
            return safe_open(path, framework="pt")
        except FileNotFoundError:
            raise CheckpointError(
                f"{path} is missing, though {INDEX} names it. Download the checkpoint again."
            ) from None
        except (SafetensorError, OSError) as problem:
            raise CheckpointError(
                f"{path} is not a whole safetensors file ({problem}); it may be truncated. Download it again."
            ) from problem

    def read(self, stored_name: str) -> Tensor:
        """Read one tensor by its name on disk.

        Raises
        ------
        CheckpointError
            It has NaN or infinite elements.
        """
        with self._open(self.files[stored_name]) as handle:
            tensor = handle.get_tensor(stored_name)
        # The extremes show whether any is not finite, and are found thirty times as fast as the truth about each.
        floats = tensor.is_floating_point() and tensor.numel() > 0
        if floats and not all(torch.isfinite(extreme) for extreme in tensor.aminmax()):
            bad = int((~torch.isfinite(tensor)).sum())
            raise CheckpointError(
                f"The tensor {stored_name} of {self.files[stored_name]} has {bad} NaN or infinite elements of "
                f"{tensor.numel()}; a checkpoint must be finite. Use an intact one."
            )
        return tensor

    def read_ahead(self, stored_names: Iterable[str]) -> None:
        """Have the system read tensors from the disk while this process does other things, where it can.

        No more than a hint: what cannot be read is an error when it is needed.
        """
        if not hasattr(os, "posix_fadvise"):
            return
        for path, names in groupby(sorted(stored_names, key=self.files.__getitem__), key=self.files.__getitem__):
            with contextlib.suppress(OSError), open(path, "rb") as file:
                length = int.from_bytes(file.read(8), "little")
                entries = json.loads(file.read(length))
                for name in names:
                    start, stop = entries[name]["data_offsets"]
                    os.posix_fadvise(file.fileno(), 8 + length + start, stop - start, os.POSIX_FADV_WILLNEED)

    def stored(self, stored_name: str) -> tuple[tuple[int, ...], int]:
        """Shape and bytes of a tensor, from the header alone."""
        with self._open(self.files[stored_name]) as handle:
            part = handle.get_slice(stored_name)
            shape = tuple(part.get_shape())
            size = torch.Size(shape).numel() * _BYTES[part.get_dtype()]
        return shape, size

    @cached_property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights: what config.json says, or else that of the largest stored tensor."""
        named = self.raw_config.get("dtype") or self.raw_config.get("torch_dtype")
        if isinstance(named, str) and isinstance(found := getattr(torch, named, None), torch.dtype):
            return found
        largest = max(self.files, key=lambda name: self.stored(name)[1])
        with self._open(self.files[largest]) as handle:
            return handle.get_tensor(largest).dtype

    @property
    def class_ids(self) -> dict[str, int]:
        """A classifier's labels and their numbers."""
        return {str(label): int(number) for label, number in (self.config.label2id or {}).items()}

    def identity(self) -> dict[str, Path]:
        """Return the files that make the checkpoint what it is: config, weights, tokenizer; by name."""
        files = {"config.json": self.path / "config.json"}
        files |= {path.name: path for path in sorted(set(self.files.values()))}
        return files | {path.name: path for path in self.companions()}

    def companions(self) -> list[Path]:
        """Tokenizer, generation config and chat template files that go along."""
        return [self.path / name for name in COMPANIONS if (self.path / name).exists()]


_BYTES: Mapping[str, int] = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
    "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise CheckpointError(f"{path} cannot be read as JSON ({problem}). Download the checkpoint again.") from problem
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}; expected an object.")
    return value
