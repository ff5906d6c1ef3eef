"""What the modeling file of an attention's family has: attention functions."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

# What models hand to their attention beside its inputs, and stock classes pass on as it is: arguments of the attention
# functions of transformers, and others that change nothing in an attention.
PASSED_ON = frozenset(
    [
        "cu_seq_lens_k",
        "cu_seq_lens_q",
        "deterministic",
        "is_causal",
        "kernel_options",
        "max_length_k",
        "max_length_q",
        "num_items_in_batch",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "position_ids",
        "return_dict",
        "seq_idx",
        "use_cache",
    ]
)


def family(stock: type) -> Any:
    """Return the modeling module that an attention class comes from."""
    return sys.modules[stock.__module__]


def attention_function(stock: type, implementation: str) -> Any:
    """Look up an attention function by name; transformers 4 has no `get_interface`."""
    # By way of the family: this file is imported before transformers has its table of attention functions.
    own = family(stock)
    table = own.ALL_ATTENTION_FUNCTIONS
    if hasattr(table, "get_interface"):
        return table.get_interface(implementation, own.eager_attention_forward)
    return own.eager_attention_forward if implementation == "eager" else table[implementation]


def equally_wide(query: Tensor, key: Tensor, value: Tensor, implementation: str, size: int) -> Sequence[Tensor]:
    """Pad queries and keys, or values, with zeros where that lets the attention function use a fused kernel.

    vLLM has a cache for heads of the stock `size`; there all are padded to that.
    """
    states = (query, key, value)
    if implementation.startswith("vllm"):
        return [nn.functional.pad(x, (0, size - x.shape[-1])) for x in states]
    cuda = query.device.type == "cuda"
    width = max(query.shape[-1], value.shape[-1])
    if implementation in ("eager", "flex_attention") or (not cuda and query.shape[-1] == value.shape[-1]):
        return states
    # On a CPU the copy of the cache costs a single query more than the fused kernel saves, unless heads share keys
    # in half precision.
    if not cuda and query.shape[2] == 1 and (query.dtype.itemsize > 2 or query.shape[1] == key.shape[1]):
        return states
    if cuda:
        width = -(-width // 8) * 8
    return [nn.functional.pad(x, (0, width - x.shape[-1])) if x.shape[-1] < width else x for x in states]
