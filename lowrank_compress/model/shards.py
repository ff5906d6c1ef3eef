"""Which files hold a checkpoint's weights, chosen as transformers chooses, and what their headers say."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from lowrank_compress.artifacts.documents import read_json
from lowrank_compress.artifacts.files import SMALL, is_regular
from lowrank_compress.errors import ArtifactError, CheckpointError
from lowrank_compress.model.kinds import names_in, no_weights

log = logging.getLogger(__name__)
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ADAPTER = "adapter_config.json"
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
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "generation_config.json",
    # How sentence-transformers turns hidden states into an embedding; its modules have directories besides.
    "modules.json",
    "config_sentence_transformers.json",
    "sentence_bert_config.json",
    "sentence_roberta_config.json",
    "sentence_distilbert_config.json",
    "sentence_camembert_config.json",
    "sentence_xlm-roberta_config.json",
)
MODULES = "[0-9]_*"
"""Directories of the modules behind the transformer, in a model of sentence-transformers."""
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Storage of plain weights, by safetensors' names."""

_BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "C64": 64, "I64": 64, "U64": 64, "I32": 32, "U32": 32, "I16": 16,
    "U16": 16, "I8": 8, "U8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip


@dataclass(frozen=True)
class Stored:
    """A tensor on disk, as its file's header describes it.

    Attributes
    ----------
    file
        Where it is.
    dtype
        safetensors' name of its dtype: BF16, F8_E4M3, …
    shape
        Its shape.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """How many elements it has."""
        return torch.Size(self.shape).numel()

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return -(-self.elements * _BITS[self.dtype] // 8)


def stored_tensors(directory: Path) -> dict[str, Stored]:
    """Tensors by their names on disk, from the headers of the files that transformers would load.

    Raises
    ------
    CheckpointError
        There are no such files; one is missing or not whole; or the index and the shards do not agree.
    """
    files, index = _weight_files(directory)
    found: dict[str, Stored] = {}
    for name in files:
        path = directory / name
        with open_tensors(path) as handle:
            for key in handle.keys():  # noqa: SIM118 (a handle, no dictionary)
                if key in found:
                    raise CheckpointError(
                        f"The tensor {key} is in two shards, {found[key].file} and {path}; which one counts is not "
                        "said. Remove the shard that does not belong to the checkpoint."
                    )
                part = handle.get_slice(key)
                found[key] = Stored(path, part.get_dtype(), tuple(part.get_shape()))
        log.info("Reading %s (%.1f MB)", path, path.stat().st_size / 1e6)
    for key, name in (index or {}).items():
        if key not in found or found[key].file.name != name:
            raise CheckpointError(
                f"{directory / INDEX} says that the tensor {key} is in {name}, which does not hold it. The index and "
                "the shards belong to different checkpoints, or the download is incomplete: download it again."
            )
    return found


def _weight_files(directory: Path) -> tuple[list[str], dict[str, str] | None]:
    """Names of the files, and the index if one counts: a single file before an index, as transformers has it."""
    sharded = sorted(path.name for path in directory.glob("shard-[0-9]*-model-[0-9]*-of-[0-9]*.safetensors"))
    if sharded:
        raise CheckpointError(
            f"{directory} is a checkpoint of distributed training ({sharded[0]}, …). Load it with transformers and "
            "`save_pretrained` it to another directory."
        )
    if (directory / SINGLE).exists():
        return [SINGLE], None
    if (directory / INDEX).exists():
        index = read_index(directory / INDEX)
        return sorted(set(index.values())), index
    raise CheckpointError(no_weights(directory, names_in(directory)))


def read_index(path: Path) -> dict[str, str]:
    """Read an index of shards: tensor name -> file name.

    Raises
    ------
    CheckpointError
        It is no such index, or names files elsewhere.
    """
    index = read_settings(path)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not isinstance(index.get("metadata"), dict):
        raise CheckpointError(
            f"{path} has no weight_map of tensor names to files, or no metadata. Download the checkpoint again."
        )
    for key, name in weight_map.items():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(
                f"{path} says that the tensor {key} is in {name!r}; expected the name of a .safetensors file in the "
                "same directory."
            )
    return weight_map


def open_tensors(path: Path) -> Any:
    """Open a safetensors file.

    Raises
    ------
    CheckpointError
        It is missing, or not whole.
    """
    if not path.exists():
        raise CheckpointError(f"{path} is missing, though {INDEX} names it. Download the checkpoint again.")
    if not is_regular(path):
        raise CheckpointError(f"{path} is no regular file; expected a safetensors file.")
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError, MemoryError) as problem:
        raise CheckpointError(
            f"{path} is not a whole safetensors file ({problem}); it may be truncated. Download it again."
        ) from problem


def read_settings(path: Path) -> dict[str, Any]:
    """Read a JSON object that belongs to a checkpoint.

    Raises
    ------
    CheckpointError
        It is none.
    """
    try:
        # A key that is there twice is the last one, as it is for transformers.
        return read_json(path, unique=False, mend="Download the checkpoint again.")
    except ArtifactError as problem:
        raise CheckpointError(str(problem)) from problem


def require_small(path: Path) -> None:
    """Refuse what would be read for hours, or waited for, where a small file is expected.

    Raises
    ------
    CheckpointError
        It is no regular file, or far too large.
    """
    if not is_regular(path):
        raise CheckpointError(f"{path} is no regular file; expected one. Download the checkpoint again.")
    if (size := path.stat().st_size) > SMALL:
        raise CheckpointError(f"{path} has {size:,} bytes; no such file has more than {SMALL:,}.")
