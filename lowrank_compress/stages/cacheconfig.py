"""What `lrc cache` can be told, and what it takes from a run's recipe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from lowrank_compress.config import CalibrationSet
from lowrank_compress.errors import InputError
from lowrank_compress.recipe import Recipe
from lowrank_compress.stages.environment import micro_batch
from lowrank_compress.stages.quantizeconfig import SAMPLES, SEQ_LEN, text_of
from lowrank_compress.strict import MANY


class CacheConfig(CalibrationSet):
    """What the checkpoint with a smaller cache depends on.

    Attributes
    ----------
    kv_ratio
        Share of the dense model's key-value cache that is to go.
    kv_window
        Last tokens whose keys and values are kept exactly besides.
    round_to
        Ranks are multiples of it.
    damping_fisher, damping_gram, clip
        As in the recipe.
    device
        Where.
    """

    samples: int = Field(default=SAMPLES, ge=1, le=MANY)
    kv_ratio: float = Field(gt=0, lt=1)
    kv_window: int = Field(default=0, ge=0, le=MANY)
    round_to: int = Field(default=1, ge=1, le=MANY)
    damping_fisher: float = 1e-4
    damping_gram: float = 1e-6
    clip: float | None = None
    device: str = "cpu"
    shard_bytes: int = 1_000_000_000


def options_of(data: Mapping[str, Any], recipe: Recipe | None, device: str) -> dict[str, Any]:
    """Decide what a config says of data, dampings and device.

    Parameters
    ----------
    data
        What was asked for: source, text_column, label_column, samples, seq_len, seed; None for what was not.
    recipe
        Of the run whose cache is made smaller; None for a checkpoint that is none's.
    device
        Where to compute.

    Raises
    ------
    InputError
        No text is named.
    """
    found = text_of(data, recipe)
    if "source" not in found:
        raise InputError("A smaller cache is fitted to what the model does on a text: name one with --calibration.")
    if recipe is not None:
        found |= {name: getattr(recipe, name) for name in ("damping_fisher", "damping_gram", "clip")}
    length: int = found.setdefault("seq_len", SEQ_LEN)
    return found | {"device": device, "micro_batch": micro_batch(device, length)}
