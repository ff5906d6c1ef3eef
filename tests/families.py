"""Families as a plug-in adds them, taken out of the table: an entry says what their attention does."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, PreTrainedModel

from lowrank_compress import registry
from lowrank_compress.arch.spec import Architecture
from lowrank_compress.arch.table import ARCHITECTURES
from lowrank_compress.shipped.traits import Traits
from tests.tiny import BOS, EOS, PAD, TINY, random_model

LLAMA = ARCHITECTURES["llama"].projections
# Every fourth layer, here every second, has no rotary positions.
SMOLLM3 = Architecture(
    "smollm3", ("smollm3",), "layers", "self_attn", LLAMA, traits=Traits(rotates="use_rope", window="sliding_window")
)
# Queries and keys are normalised over all heads together.
OLMO2 = Architecture(
    "olmo2",
    ("olmo2",),
    "layers",
    "self_attn",
    LLAMA,
    traits=Traits(query_norm="q_norm", key_norm="k_norm", whole_norms=True),
)
# What their authors might have written, not knowing that.
PLAIN_SMOLLM3 = Architecture("smollm3", ("smollm3",), "layers", "self_attn", LLAMA)
PLAIN_OLMO2 = Architecture("olmo2", ("olmo2",), "layers", "self_attn", LLAMA)
HEAD_NORMED_OLMO2 = Architecture(
    "olmo2", ("olmo2",), "layers", "self_attn", LLAMA, traits=Traits(query_norm="q_norm", key_norm="k_norm")
)
CONFIGS: dict[str, dict[str, Any]] = {
    "smollm3": {"num_hidden_layers": 4, "no_rope_layers": [1, 0, 1, 0], "use_sliding_window": False},
    "olmo2": {},
}


def register(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Let the entries of this file be found as those of an installed package are, until the test ends."""
    points = [EntryPoint(name, f"{__name__}:{name}", "lowrank_compress.architectures") for name in names]
    monkeypatch.setattr(registry, "entry_points", lambda group: [point for point in points if point.group == group])
    # Entries of the table win; here it does not have these families.
    known = {name: entry for name, entry in ARCHITECTURES.own.items() if name not in CONFIGS}
    monkeypatch.setattr(ARCHITECTURES, "_own", known)
    monkeypatch.setattr(ARCHITECTURES, "_all", None)


def family(name: str, dtype: torch.dtype = torch.float32, **overrides: Any) -> PreTrainedModel:
    """Make a tiny random model of such a family."""
    common = {"vocab_size": 96, "bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
    return random_model(CONFIG_MAPPING[name](**common | TINY["llama"] | CONFIGS[name] | overrides), dtype=dtype)
