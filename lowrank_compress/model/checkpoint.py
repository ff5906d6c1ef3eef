"""A checkpoint directory on disk: its config, its tensors by the model's own names, its companion files."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoConfig, GenerationConfig, PretrainedConfig

from lowrank_compress.arch.table import unknown_model_type
from lowrank_compress.errors import CheckpointError, UnsupportedError
from lowrank_compress.model import packing, settings
from lowrank_compress.model.kinds import PICKLED, names_in, no_config
from lowrank_compress.model.shards import (
    ADAPTER,
    COMPANIONS,
    FLOATS,
    MODULES,
    Stored,
    open_tensors,
    read_settings,
    require_small,
    stored_tensors,
)


@dataclass(frozen=True)
class Checkpoint:
    """A Hugging Face checkpoint directory with safetensors weights.

    What is read is what transformers would load from it, or an error.

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
            raise CheckpointError(no_config(self.path, names_in(self.path)))
        if (self.path / ADAPTER).exists():
            raise CheckpointError(
                f"{self.path} has weights and an adapter beside them ({ADAPTER}), which transformers would add. Remove "
                "the adapter, or name the directory to `lrc compress` or `lrc eval`, which merge it."
            )

    @cached_property
    def config(self) -> PretrainedConfig:
        """The model's configuration.

        Raises
        ------
        UnsupportedError
            The model type is unknown, or the weights are quantized.
        CheckpointError
            transformers cannot read it, or it asks for more than is stored.
        """
        kind = self.raw_config.get("model_type")
        own_code = settings.own_code(self.raw_config)
        if kind not in CONFIG_MAPPING and not own_code:
            raise UnsupportedError(unknown_model_type(str(kind)))
        _ = self.quantization
        settings.refuse_own_code(
            self.path, self.raw_config, known=kind in CONFIG_MAPPING, trusted=self.trust_remote_code
        )
        settings.refuse_absurd(self.path, self.raw_config, self.tensors)
        self.companions()  # complains of those that reading would wait for
        try:
            found = AutoConfig.from_pretrained(self.path, trust_remote_code=self.trust_remote_code)
        except Exception as problem:  # transformers raises many types here
            raise CheckpointError(
                f"transformers cannot read {self.path / 'config.json'} (model_type {kind!r}): {in_a_line(problem)}"
            ) from problem
        try:
            GenerationConfig.from_pretrained(self.path)
        except OSError:  # there is none, or none that transformers takes notice of
            pass
        except Exception as problem:
            raise CheckpointError(
                f"transformers cannot read {self.path / 'generation_config.json'}: {in_a_line(problem)}. Mend it, or "
                "remove it."
            ) from problem
        return found

    @cached_property
    def raw_config(self) -> dict[str, Any]:
        """config.json as it stands on disk."""
        return read_settings(self.path / "config.json")

    @cached_property
    def quantization(self) -> dict[str, Any] | None:
        """How this package compressed the checkpoint: its ``quantization_config``; None for a dense one.

        Of one in the format of compressed-tensors it is what ours would be.

        Raises
        ------
        UnsupportedError
            It is quantized by something else, or by a newer version of this package.
        CheckpointError
            The entry is malformed.
        """
        found = self.raw_config.get("quantization_config")
        if isinstance(found, dict) and found.get("quant_method") == packing.METHOD:
            return packing.layout_of(self.path, found, self.tensors, self.read)
        return settings.quantization(self.path, self.raw_config)

    @cached_property
    def tensors(self) -> dict[str, Stored]:
        """All tensors by their names on disk, as their files' headers have them.

        Raises
        ------
        CheckpointError
            No safetensors, a shard that the index names is missing, or a file is truncated.
        """
        return stored_tensors(self.path)

    @cached_property
    def files(self) -> dict[str, Path]:
        """Tensor name on disk -> the safetensors file that holds it."""
        return {name: stored.file for name, stored in self.tensors.items()}

    def read(self, stored_name: str, row: int | None = None) -> Tensor:
        """Read one tensor by its name on disk, or a row of it, that is of its first dimension.

        Raises
        ------
        CheckpointError
            It has NaN or infinite elements.
        """
        with open_tensors(self.files[stored_name]) as handle:
            tensor = handle.get_tensor(stored_name) if row is None else handle.get_slice(stored_name)[row]
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
        found = self.tensors[stored_name]
        return found.shape, found.size

    @cached_property
    def dtype(self) -> torch.dtype:
        """The dtype in which transformers loads the weights: what config.json says, or the first tensor's.

        Raises
        ------
        CheckpointError
            config.json names none that weights can have.
        """
        named = self.raw_config.get("dtype") or self.raw_config.get("torch_dtype")
        if named is None:
            stored = list(self.tensors.values())
            kinds = [tensor.dtype for tensor in stored if tensor.file == stored[0].file]
            return next((FLOATS[kind] for kind in kinds if kind in FLOATS), torch.float32)
        found = getattr(torch, named.removeprefix("torch."), None) if isinstance(named, str) else None
        if not isinstance(found, torch.dtype) or found not in FLOATS.values():
            raise CheckpointError(
                f"{self.path / 'config.json'} has the dtype {named!r}; expected one of "
                f"{', '.join(str(dtype).removeprefix('torch.') for dtype in FLOATS.values())}."
            )
        return found

    @property
    def class_ids(self) -> dict[str, int]:
        """A classifier's labels and their numbers.

        Raises
        ------
        CheckpointError
            A number is beyond its classes.
        """
        found = {str(label): int(number) for label, number in (self.config.label2id or {}).items()}
        classes = self.config.num_labels or 0
        if wrong := [label for label, number in found.items() if number >= classes]:
            raise CheckpointError(
                f"{self.path / 'config.json'} gives the label {wrong[0]!r} the number {found[wrong[0]]} of only "
                f"{classes} classes; expected numbers below that in label2id."
            )
        return found

    def identity(self) -> dict[str, Path]:
        """Return the files that make the checkpoint what it is: config, weights, tokenizer, trusted code; by name."""
        files = {"config.json": self.path / "config.json"}
        require_small(files["config.json"])
        files |= {path.name: path for path in sorted(set(self.files.values()))}
        templates = sorted((self.path / "additional_chat_templates").glob("*.jinja"))
        for path in templates:
            require_small(path)
            files[f"{path.parent.name}/{path.name}"] = path
        return files | {path.relative_to(self.path).as_posix(): path for path in self.companions()}

    def companions(self) -> list[Path]:
        """Tokenizer, generation config, chat template, sentence-transformers' files, which go along; trusted code too.

        Raises
        ------
        CheckpointError
            One is no regular file, or far too large.
        """
        found = [self.path / name for name in COMPANIONS if (self.path / name).exists()]
        found += sorted(self.path.glob("*.py")) if self.trust_remote_code else []
        for path in found:
            require_small(path)
        return found + self._modules()

    def _modules(self) -> list[Path]:
        """Files of what sentence-transformers runs behind the model: pooling, normalisation, dense layers.

        Raises
        ------
        UnsupportedError
            One is a pickle.
        """
        if not (self.path / "modules.json").exists():
            return []
        found = [path for path in sorted(self.path.glob(f"{MODULES}/*")) if path.is_file()]
        if pickled := [path for path in found if path.suffix in PICKLED]:
            raise UnsupportedError(
                f"{pickled[0]} is a pickle, which can run any code and does not go along. Load the model with "
                "sentence-transformers where you trust it and save it anew, which writes safetensors."
            )
        return found


def in_a_line(problem: BaseException) -> str:
    """What an exception of transformers tells its user, in one line; Python's own words are for programmers."""
    if isinstance(problem, AttributeError | TypeError | LookupError | NameError | AssertionError | RecursionError):
        return "its values do not fit together"
    text = " ".join(str(problem).split()).replace("NoneType", "null").replace("TypeError: ", "")
    text = text or "it does not say why"
    return text if len(text) <= 300 else text[:300] + " …"
