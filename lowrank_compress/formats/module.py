"""From encoded matrices to the tensors and the config entry of a compressed module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lowrank_compress.arch.targets import Target
from lowrank_compress.formats.spec import Encoded
from lowrank_compress.shipped.formats.base import INDEX_DTYPE
from lowrank_compress.shipped.formats.table import FORMATS as PARTS


def module_entry(targets: Sequence[Target], parts: Sequence[Encoded]) -> dict[str, Any]:
    """Describe a compressed module as `quantization_config.modules` of config.json does."""
    return {
        "in_features": parts[0].shape[1],
        "out_features": sum(part.shape[0] for part in parts),
        "bias": targets[0].bias is not None,
        "heads": targets[0].view.rows.groups,
        "parts": [PARTS[part.format].describe(*part.shape, *part.parameters) for part in parts],
    }


def joined(targets: Sequence[Target], parts: Sequence[Tensor]) -> Tensor:
    """Put the rows (out_i, …) of a module's parts in the order in which the module has them."""
    groups = targets[0].view.rows.groups
    return torch.cat([part.unflatten(0, (groups, -1)) for part in parts], 1).flatten(0, 1)


def module_tensors(targets: Sequence[Target], parts: Sequence[Encoded], dtype: torch.dtype) -> dict[str, Tensor]:
    """Name the tensors of a compressed module by their leaf names (see `CompressedLinear`), without the bias."""
    tensors = {
        "lr_in.weight": torch.cat([part.inner for part in parts]).to(dtype),
        "weight": torch.empty(0, dtype=dtype),
    }
    for number, part in enumerate(parts):
        suffix = "" if len(parts) == 1 else f"_{number}"
        for leaf, tensor in part.others.items():
            first, dot, below = leaf.partition(".")
            stored = tensor.to(dtype if tensor.is_floating_point() else INDEX_DTYPE)
            tensors[f"{first}{suffix}{dot}{below}"] = stored
    return tensors
