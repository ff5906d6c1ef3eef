"""The config entry of an attention with narrower heads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lowrank_compress.arch.spec import Role
from lowrank_compress.arch.targets import Heads, Target
from lowrank_compress.shipped.traits import Traits

ROTARY = "lr_rotary"  # the buffer of `CompressedAttention`
KEPT = "lr_kept"  # that of `PrunedRouter`
LEADS = "lr_leads"  # that of `SeparateExperts`
LATENT, REBUILD = "lr_latent", "lr_rebuild"  # the factors of `LatentAttention`


def attention_entry(
    targets: Mapping[Role, Target], heads: Heads, query_key: int, value: int, *, rotary: bool, traits: Traits
) -> dict[str, Any]:
    """Describe an attention module with narrower heads as `quantization_config.attention` of config.json does.

    Parameters
    ----------
    targets
        q, k, v and o.
    query_key, value
        The dimensions that heads keep.
    rotary
        Whether the kept dimensions of rotated heads are listed in a buffer.
    traits
        What the family's attention does beyond the usual; where it does nothing, the entry says nothing of it.
    """
    entry = {
        "heads": heads.query,
        "kv_heads": heads.key,
        "size": heads.size,
        "query_key": query_key,
        "value": value,
        "rotary": rotary,
        "interleaved": targets["q"].view.rows.groups > 1,
        "projections": {role: targets[role].module for role in ("q", "k", "v", "o")},
    }
    return entry | ({"traits": traits.entry()} if traits.entry() else {})
