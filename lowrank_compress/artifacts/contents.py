"""What safetensors files hold, tensor by tensor."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lowrank_compress.artifacts.files import is_regular
from lowrank_compress.errors import ArtifactError


def tensors_of(files: Iterable[Path]) -> Iterator[tuple[Path, str, Tensor]]:
    """Yield file, name and value of all tensors of some files, one at a time.

    Raises
    ------
    ArtifactError
        A file is missing or is no safetensors file.
    """
    for path in files:
        if not is_regular(path):
            raise ArtifactError(f"{path} is missing or no regular file; expected a safetensors file.")
        try:
            with safe_open(path, framework="pt") as handle:
                for name in sorted(handle.keys()):
                    yield path, name, handle.get_tensor(name)
        except (OSError, SafetensorError) as problem:
            raise ArtifactError(f"{path} is not a whole safetensors file ({problem}).") from None


def raw(tensor: Tensor) -> Tensor:
    """Return the bytes of each element: uint8 (elements, bytes an element)."""
    flat = tensor.detach().cpu().contiguous().flatten()
    return flat.view(torch.uint8).view(len(flat), flat.element_size())


def tensor_hash(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes alone; dtype and shape are not in it."""
    return hashlib.sha256(raw(tensor).numpy().data if tensor.numel() else b"").hexdigest()


def dtype_name(tensor: Tensor) -> str:
    """Name a dtype as config.json does, float32 for instance."""
    return str(tensor.dtype).removeprefix("torch.")
