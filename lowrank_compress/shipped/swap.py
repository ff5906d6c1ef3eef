"""Compressed modules in the place of stock ones, and their check once they are loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from operator import attrgetter
from typing import Any

import torch
from torch import nn

from .attention import CompressedAttention, Heads, compressed_class
from .config import LowRankConfig
from .experts import SeparateExperts, separate
from .family import family
from .formats.base import INDEX_DTYPE, require_distinct
from .latent import LENGTH_DEPENDENT, Latent, latent_class
from .linear import CompressedLinear, Stock
from .lookup import lacking, looked_up
from .modules import dense_module, find, put, shape_of, stock_of
from .packed import PackedLinear, packed_like
from .router import PrunedRouter, prune_router
from .traits import Traits


def swap_modules(model: nn.Module, config: LowRankConfig) -> None:
    """Replace the modules that `config` names by uninitialised ones of its shapes, on their device and in their dtype.

    Attention modules and routers stay the objects they are; they get a class that computes with less. Experts become
    modules of their own, in which the other paths lead on. Paths are those of the saved model (see `find`). A model
    that has no head, as `AutoModel` loads it, forgets what `config` says of one.

    Raises
    ------
    ValueError
        If a path leads nowhere, or to a module that is not a linear layer of the shape that the entry replaces, or not
        an attention with such heads.
    """
    linears = (config.factor_quantization or {}).get("linears", {})
    for entries in (config.modules, linears):
        for path in _of_absent_head(model, entries):
            del entries[path]
    for path, count in config.experts.items():
        experts = separate(model, path)
        if len(experts) != count:
            raise ValueError(f"{path} has {len(experts)} experts in the model, but {count} in the low-rank config")
        experts.mark()
    for path, count in config.merged.items():
        find(model, path)[1].merge(count)
    for path, entry in config.routers.items():
        _swap_router(model, path, entry)
    for path, (rows, columns, *parts) in config.dense_shapes.items():
        name, old = find(model, path)
        stock = stock_of(path, old)._replace(parts=parts[0] if parts else 1)
        new = dense_module(Stock(rows, columns, stock.bias, stock.conv1d), old.weight)
        new.lr_stock = stock
        put(model, name, new)
    for path, entry in config.modules.items():
        name, old = find(model, path)
        stock = stock_of(path, old)
        shape = (entry["out_features"], entry["in_features"])
        if shape != shape_of(old):
            raise ValueError(
                f"{path} is {shape_of(old)} (out, in) in the model, but {shape} in the checkpoint's low-rank config"
            )
        new = CompressedLinear(**entry, stock=stock, device=old.weight.device, dtype=old.weight.dtype)
        put(model, name, new.train(old.training))
    for path, entry in config.attention.items():
        _swap_attention(model, path, entry)
    for path, packing in linears.items():
        name, old = find(model, path)
        put(model, name, packed_like(path, old, packing))


def _of_absent_head(model: nn.Module, paths: Iterable[str]) -> list[str]:
    """Find the paths outside of a base model, in which it has nothing of the name that they begin with."""
    prefix = getattr(model, "base_model_prefix", "")
    if not prefix or getattr(model, "base_model", None) is not model:
        return []
    inside = {prefix, *(name for name, _ in model.named_children())}
    return [path for path in paths if path.partition(".")[0] not in inside]


def _swap_router(model: nn.Module, path: str, entry: Mapping[str, int]) -> None:
    """Let the router at `path` know fewer experts; which ones is loaded."""
    router = find(model, path)[1]
    weight = getattr(router, "weight", None)
    if not isinstance(weight, torch.Tensor) or len(weight) != entry["experts"]:
        raise ValueError(
            f"{path} of the low-rank config is a {type(router).__name__}, expected a router with a row for each of "
            f"{entry['experts']} experts"
        )
    prune_router(router, torch.arange(entry["kept"], device=weight.device))


def _swap_attention(model: nn.Module, path: str, entry: Mapping[str, Any]) -> None:
    """Let the attention at `path` compute with the projections that are in place."""
    module = find(model, path)[1]
    heads = _heads(path, module, entry)
    latent = Latent(**entry["latent"]) if "latent" in entry else None
    turning = turning_of(model)
    problem = _problem(module, heads) or ("" if latent is None else latent_problem(module, heads.traits, turning))
    if problem:
        raise ValueError(f"{path} of the low-rank config: {problem}")
    places = entry["projections"]
    linear = {role: find(model, place)[1] for role, place in places.items()}

    def check(role: str, side: int, kept: int, stock: int) -> None:
        found = shape_of(linear[role])[side], stock_of(places[role], linear[role])[side]
        if found != (kept, stock):
            raise ValueError(
                f"{places[role]} has {found[0]} {('rows', 'columns')[side]}, stock {found[1]}; the heads in the "
                f"low-rank config need {kept}, stock {stock}"
            )

    rows = (heads.heads * heads.query_key, heads.kv_heads * heads.query_key, heads.kv_heads * heads.value)
    stock_rows = tuple(heads.size * n for n in (heads.heads, heads.kv_heads, heads.kv_heads))
    if heads.q == heads.k:
        check("q", 0, sum(rows), sum(stock_rows))
    else:
        for role, kept, stock in zip("qkv", rows, stock_rows, strict=True):
            check(role, 0, kept, stock)
    check("o", 1, heads.heads * heads.value, heads.heads * heads.size)
    if heads.value < heads.size:
        output, stock = linear["o"], stock_of(places["o"], linear["o"])._replace(groups=heads.heads)
        setattr(output, "stock" if isinstance(output, CompressedLinear) else "lr_stock", stock)
    stock_class = type(module)
    module.__class__ = compressed_class(stock_class)
    module.lr_heads = heads
    if heads.rotary:
        first = torch.arange(heads.query_key // 2, dtype=INDEX_DTYPE, device=linear["q"].weight.device)
        pairs = torch.cat([first, first + heads.size // 2])
        module.register_buffer("lr_rotary", pairs.repeat(heads.kv_heads, 1))
    if latent is not None:
        like, hidden = linear["q"].weight, shape_of(linear["q"])[1]
        module.__class__ = latent_class(stock_class)
        module.lr_latent = dense_module(Stock(latent.rank, hidden, False, False), like)
        rebuilt = heads.kv_heads * (heads.query_key + heads.value)
        module.lr_rebuild = dense_module(Stock(rebuilt, latent.rank, False, False), like)
        module.lr_remembered = latent
        module.lr_turning = turning  # a tuple, so that it is no child


def _heads(path: str, module: nn.Module, entry: Mapping[str, Any]) -> Heads:
    """Read an attention's entry."""
    places = entry["projections"]
    children = {role: p.removeprefix(f"{path}.") if p.startswith(f"{path}.") else "" for role, p in places.items()}
    fields: dict[str, Any] = {
        name: value for name, value in entry.items() if name in Heads._fields and name != "traits"
    }
    fields |= children
    return Heads(**fields, traits=Traits(**entry["traits"]) if "traits" in entry else looked_up(module))


def _problem(module: Any, heads: Heads) -> str:
    """Say why a module cannot compute with such heads, or nothing."""
    own, traits = family(type(module)), heads.traits
    rotates = hasattr(own, "apply_rotary_pos_emb")
    if not hasattr(own, "eager_attention_forward") or not hasattr(module, "scaling"):
        return f"a {type(module).__name__} is not an attention that can be made smaller"
    if getattr(module, "num_key_value_groups", heads.heads // heads.kv_heads) != heads.heads // heads.kv_heads:
        return f"the model shares a key-value head among {module.num_key_value_groups} heads"
    if heads.rotary and not rotates:
        return f"a {type(module).__name__} has no rotary embedding"
    if traits.query_norm and (heads.rotary or heads.query_key < heads.size):
        return "queries and keys with norms of their own must keep their heads as they are"
    if rotates and heads.query_key < heads.size and not heads.rotary:
        return "queries and keys that are rotated and smaller need rotary indices"
    return lacking(traits, module)


def turning_of(model: nn.Module) -> tuple[nn.Module, ...]:
    """Return the modules that make a model's rotary tables."""
    return tuple(
        module
        for module in model.modules()
        if any(name == "inv_freq" or name.endswith("_inv_freq") for name in module._buffers)
    )


def latent_problem(module: Any, traits: Traits, turning: tuple[nn.Module, ...]) -> str:
    """Say why an attention cannot rebuild keys from a latent, or nothing.

    Parameters
    ----------
    module
        The attention.
    traits
        Of its family.
    turning
        What makes the model's rotary tables.
    """
    window = attrgetter(traits.window)(module) if traits.window else getattr(module, "sliding_window", None)
    if window is not None:
        return "it sees a sliding window of tokens, whose cache is short already"
    if getattr(module, "is_causal", True) is not True:
        return "it is no decoder, so that it has no cache"
    if not hasattr(family(getattr(type(module), "lr_stock_class", type(module))), "apply_rotary_pos_emb"):
        return ""
    if len(turning) != 1 or "inv_freq" not in turning[0]._buffers:
        return f"the model has {len(turning) or 'no'} rotary embeddings of its own kind, expected one for all layers"
    kind = getattr(turning[0], "rope_type", "default")
    if kind in LENGTH_DEPENDENT:
        return f"its rotary embeddings ({kind}) depend on how long the text is, so that keys cannot be rotated anew"
    return ""


def check_indices(model: nn.Module) -> None:
    """Make sure that stored indices name rows that there are, each once: others would compute something else.

    Raises
    ------
    ValueError
        They do not.
    """
    for path, module in model.named_modules():
        if isinstance(module, CompressedLinear):
            for part in module.parts:
                part.check(module, path)
        elif isinstance(module, PackedLinear):
            module.check(path)
        elif isinstance(module, CompressedAttention) and module.lr_heads.rotary:
            # Pivot rows come in their order; those of a head's pairs in any.
            size = module.lr_heads.size
            require_distinct(f"{path}.lr_rotary", module.get_buffer("lr_rotary"), size, ascending=False)
        elif isinstance(module, PrunedRouter):
            require_distinct(f"{path}.lr_kept", module.get_buffer("lr_kept"), module.lr_experts)
        elif isinstance(module, SeparateExperts) and module.merged:
            module.check(path)
