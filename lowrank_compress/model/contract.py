"""What is stored against what the config asks for: all tensors, from the headers, before any work.

transformers initialises at random what is missing, casts whatever is stored, and drops what it does not know, each with
no more than a warning. Here the first two are errors, and the last is a warning too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from lowrank_compress.errors import CheckpointError, UnsupportedError
from lowrank_compress.model.shards import FLOATS, Stored

# What the formats of quantized weights store beside a weight, or in place of it.
_QUANTIZED = re.compile(
    r"\.(qweight|qzeros|g_idx|scales|weight_scale(_inv|_2)?|input_scale|weight_zero_point|weight_packed|weight_shape"
    r"|SCB|weight_format|q_perm|q_scale|q_group_size|qdata|W_q|codebooks)$"
    r"|\.weight[.:_](absmax|quant_map|nested_absmax|nested_quant_map|quant_state|qdata|scale|zero_point|data)\b"
)
NAMED = 5


def check(
    path: Path,
    model: PreTrainedModel,
    tensors: Mapping[str, Stored],
    stored: Mapping[str, str],
    ties: Mapping[str, str],
    wholes: Mapping[str, Tensor],
) -> None:
    """Make sure that a model's tensors are stored, in their shapes and as plain numbers.

    Parameters
    ----------
    path
        The checkpoint, for messages.
    model
        On the meta device.
    tensors
        Everything that is stored, by its name on disk.
    stored
        Name in the model -> name on disk.
    ties
        Further names on disk of tied tensors -> name on disk of the one they are tied to.
    wholes
        Name in the model -> what is stored in its place, where that is a tensor it is a piece of.

    Raises
    ------
    UnsupportedError
        Weights are quantized.
    CheckpointError
        A tensor is missing, or has another shape or kind of dtype than the model's.
    """
    state: dict[str, Tensor] = model.state_dict()
    asked = {on_disk: wholes.get(name, state[name]) for name, on_disk in stored.items()}
    asked |= {other: asked[one] for other, one in ties.items() if one in asked}
    companion = next((name for name in tensors if name not in asked and _QUANTIZED.search(name)), None)
    if companion is not None:
        raise UnsupportedError(
            f"{path} is quantized: it stores {companion} ({tensors[companion].dtype}); expected plain floating-point "
            "weights. Start from the dense checkpoint that it was made from."
        )
    for on_disk, expected in asked.items():
        _check_kind(on_disk, tensors[on_disk], expected)
    missing = [name for name in state if name not in stored and name not in model.all_tied_weights_keys]
    if missing:
        raise CheckpointError(
            f"{path} has no tensor {_few(missing)}, which its config asks for. The checkpoint is incomplete, or its "
            "config.json belongs to another one."
        )
    for on_disk, expected in asked.items():
        found = tensors[on_disk]
        if found.shape != tuple(expected.shape):
            raise CheckpointError(
                f"The tensor {on_disk} of {found.file} has the shape {_by(found.shape)}, but the config asks for "
                f"{_by(tuple(expected.shape))}. The config.json belongs to another checkpoint, or was edited."
            )


def _check_kind(name: str, found: Stored, expected: Tensor) -> None:
    if expected.is_floating_point() == (found.dtype in FLOATS):
        return
    raise UnsupportedError(
        f"The tensor {name} of {found.file} is stored as {found.dtype}; expected "
        f"{', '.join(FLOATS) if expected.is_floating_point() else 'whole numbers'}. Quantized weights are not "
        "supported: use the unquantized checkpoint."
    )


def unexpected(model: PreTrainedModel, names: Mapping[str, str]) -> list[str]:
    """Keep those that transformers would warn of as unexpected: not those that it drops in silence.

    Parameters
    ----------
    names
        Names on disk of tensors that the model does not know -> what they would be called in it.
    """
    buffers = [name for name, _ in model.named_buffers()]
    patterns = set(model._keys_to_ignore_on_load_unexpected or ())
    if any(name.endswith("rotary_emb.inv_freq") for name in buffers):
        patterns.add(r"rotary_emb\.inv_freq")
    if any(name.endswith("position_ids") for name in buffers):
        patterns.add(r"(^|\.)position_ids$")
    return [on_disk for on_disk, name in names.items() if not any(re.search(pattern, name) for pattern in patterns)]


def dropped(path: Path, names: list[str]) -> tuple[str, ...]:
    """Say which stored tensors the model does not know, if there are any."""
    if not names:
        return ()
    count = "1 tensor" if len(names) == 1 else f"{len(names)} tensors"
    return (
        f"{path} stores {count} that its config has no place for, and that transformers drops: {_few(names)}. If they "
        "matter, its config.json is not the right one.",
    )


def _few(names: list[str]) -> str:
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


def _by(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape)) or "of a single number"
