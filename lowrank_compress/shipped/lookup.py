"""The traits of an attention, held against its attributes."""

from __future__ import annotations

from torch import nn

from .traits import Traits


def looked_up(attention: nn.Module) -> Traits:
    """Tell an attention's traits by its attributes, for entries that do not say any.

    Such are those of attentions that are as usual, and all that were written before version 3.
    """
    normed = isinstance(getattr(attention, "q_norm", None), nn.Module)
    window = "sliding_window" if hasattr(attention, "sliding_window") else ""
    # Mistral and Phi-3 ask their config; other families' configs may have come by a window that they ignore, or have
    # layers of two kinds, of which the mask alone tells attention that knows no window.
    layered = getattr(attention.config, "layer_types", None) is not None
    if not window and not layered and hasattr(type(attention.config), "sliding_window"):
        window = "config.sliding_window"
    dropouts = ("attention_dropout", "attn_dropout", "dropout")
    return Traits(
        query_norm="q_norm" if normed else "",
        key_norm="k_norm" if normed else "",
        window=window,
        # Gemma 3 has the attribute, but does not use it.
        soft_cap="" if normed or not hasattr(attention, "attn_logit_softcapping") else "attn_logit_softcapping",
        dropout=next((name for name in dropouts if getattr(attention, name, None) is not None), ""),
        output_dropout="resid_dropout" if isinstance(getattr(attention, "resid_dropout", None), nn.Module) else "",
        reordered="reorder_and_upcast_attn" if hasattr(attention, "reorder_and_upcast_attn") else "",
    )


def lacking(traits: Traits, attention: nn.Module) -> str:
    """Say which attribute that its traits name an attention does not have, or nothing."""
    for field in ("query_norm", "key_norm", "output_dropout"):
        if (name := getattr(traits, field)) and not isinstance(getattr(attention, name, None), nn.Module):
            return f"a {type(attention).__name__} has no module {name}, which is to be its {field}"
    for field in ("rotates", "window", "soft_cap", "dropout", "reordered", "sinks"):
        owner, _, leaf = (name := getattr(traits, field)).rpartition(".")
        if name and not hasattr(getattr(attention, owner, None) if owner else attention, leaf):
            return f"a {type(attention).__name__} has no {name}, which is to be its {field}"
    return ""
