"""What the attention of the families in the table does beyond the usual, by name."""

from __future__ import annotations

from lowrank_compress.shipped.traits import Traits

# Each layer knows its window, or none.
WINDOWED = Traits(window="sliding_window")
# All layers have the window of the configuration.
ALL_WINDOWED = Traits(window="config.sliding_window")
# Queries and keys are normalised head by head. (Gemma 3 has a soft cap besides, but does not use it.)
NORMED = WINDOWED._replace(query_norm="q_norm", key_norm="k_norm")
# The same, where no layer has a window.
NORMED_HEADS = NORMED._replace(window="")
# Queries and keys are normalised over all heads together.
NORMED_AS_A_WHOLE = Traits(query_norm="q_norm", key_norm="k_norm", whole_norms=True)
WINDOWED_NORMED_AS_A_WHOLE = NORMED_AS_A_WHOLE._replace(window="sliding_window")
# Every few layers there is one without rotary positions.
UNROTATED_LAYERS = WINDOWED._replace(rotates="use_rope")
# The scores are bounded.
SOFT_CAPPED = WINDOWED._replace(soft_cap="attn_logit_softcapping")
# Attention weights are dropped as `dropout` says.
DROPPING = Traits(dropout="dropout")
# Each head has a sink, and rotary tables a column for each pair.
SINKING = WINDOWED._replace(sinks="sinks", halved_tables=True)
GPT2 = Traits(dropout="attn_dropout", output_dropout="resid_dropout", reordered="reorder_and_upcast_attn")
GPT_BIGCODE = Traits(dropout="attn_dropout", output_dropout="resid_dropout")
