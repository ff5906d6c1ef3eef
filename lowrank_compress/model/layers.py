"""The compressed linear layer and attention, and what makes ``from_pretrained`` load them: a quantizer, remote code.

This file imports nothing but torch and transformers, because a byte-for-byte copy of it (``REMOTE_FILE``) travels in
every compressed checkpoint. Importing it, here or as the copy, registers the quantizer; the package's stays in place.
"""

from __future__ import annotations

import copy
import functools
import inspect
import shutil
import sys
import weakref
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from transformers.cache_utils import EncoderDecoderCache
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

QUANT_METHOD = "lowrank"
# Of what a checkpoint holds; raised when code that knows only earlier ones could not load it. 2: indices are int32.
VERSION = 2
INDEX_DTYPE = torch.int32
FORMATS = ("pair", "pivot", "dense")
REMOTE_FILE = "modeling_lowrank.py"
PACKAGE = "lowrank_compress.model.layers"


class Stock(NamedTuple):
    """The module of the uncompressed model in whose place a smaller one stands: what a dense export restores.

    The inputs were cut at the end of each of `groups` equal groups (the heads, for an attention's output), the outputs
    at the end of each of `parts` equal parts (two, where a weight holds an MLP's gate and up).
    """

    out_features: int
    in_features: int
    bias: bool
    conv1d: bool
    groups: int = 1
    parts: int = 1


class Part(NamedTuple):
    """One part of a compressed layer: its rows, format and rows in ``lr_in``, and the end of its children's names."""

    rows: int
    format: str
    width: int
    suffix: str


class CompressedLinear(nn.Module):
    """A linear layer whose parts (one, or the fused ones) are each stored as low-rank factors.

    All parts share one product ``h = lr_in(x)``, cut into their widths. A part of m rows then emits
    ``pair``: ``lr_out(h)``, weight A·B; ``pivot``: rows ``lr_index`` are h itself and the others, ascending,
    ``lr_out(h)``; ``dense``: h. The layer equals, up to rounding, a linear layer with ``dense_weight()``.

    Parameters
    ----------
    in_features, out_features : int
        n and m of the weight (m, n) it stands for.
    bias : bool
        Whether it adds a ``bias`` (m,).
    parts : sequence of mapping
        ``{"rows": m_i, "format": "pair" | "pivot" | "dense", "rank": r_i}``; the rank of a dense part is its rows.
        With one part the children are named ``lr_out`` and ``lr_index``, else ``lr_out_0``, ``lr_index_0``, ...
    heads : int
        1: the parts' rows follow one another. More: every head emits its rows of each part in turn (GPT-NeoX).
    stock : Stock, optional
        The module it replaces, if that is not a ``nn.Linear`` of the same shape and bias.

    Notes
    -----
    Indices are int32; int64, which checkpoints of version 1 have, is taken as well.

    Weights start uninitialised: they are always loaded. The empty buffer ``weight`` (0,) makes a load by code that
    does not know this layer fail with a size mismatch instead of starting from random weights.
    """

    weight: Tensor
    lr_out: nn.Module  # of a single part

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        parts: Sequence[Mapping[str, Any]],
        heads: int = 1,
        stock: Stock | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        device = torch.get_default_device() if device is None else torch.device(device)
        self.in_features, self.out_features, self.heads = in_features, out_features, heads
        self.parts = [
            Part(int(part["rows"]), str(part["format"]), _width(part), "" if len(parts) == 1 else f"_{i}")
            for i, part in enumerate(parts)
        ]
        self.stock = stock or Stock(out_features, in_features, bias, False)
        self._ordered = any(part.format == "pivot" for part in self.parts) or (heads > 1 and len(parts) > 1)
        self._factorized = any(part.format != "dense" for part in self.parts)
        self._order: Tensor | None = None

        def linear(n: int, m: int) -> nn.Module:
            return nn.utils.skip_init(nn.Linear, n, m, bias=False, device=device, dtype=dtype)

        self.lr_in = linear(in_features, sum(part.width for part in self.parts))
        for rows, form, width, suffix in self.parts:
            if form != "dense":
                self.add_module(f"lr_out{suffix}", linear(width, rows - width if form == "pivot" else rows))
            if form == "pivot":
                self.register_buffer(f"lr_index{suffix}", torch.arange(width, dtype=INDEX_DTYPE, device=device))
        self.register_buffer("weight", torch.empty(0, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None

    def row_order(self, device: torch.device) -> Tensor:
        """Return where each output row stands in the concatenation of what the parts emit: int64 (out_features,).

        It is derived from the index buffers when first needed and kept as a plain attribute, because a buffer that is
        not in the checkpoint comes back uninitialised from the meta device.
        """
        order = self._order
        if order is not None and order.device == device:
            return order
        # A tensor made in inference mode could not be used by a later backward pass.
        with torch.inference_mode(False), torch.no_grad():
            emitted, offset = [], 0
            for rows, form, _, suffix in self.parts:
                row = torch.arange(rows, device=device)
                if form == "pivot":
                    index = self.get_buffer(f"lr_index{suffix}").to(device, torch.int64)
                    row = torch.argsort(torch.ones_like(row).scatter(0, index, 0), stable=True)
                size = rows // self.heads
                emitted.append(row // size * (self.out_features // self.heads) + offset + row % size)
                offset += size
            order = torch.argsort(torch.cat(emitted))
        if not torch.compiler.is_compiling() and type(order) is Tensor:
            self._order = order
        return order

    def remember_order(self) -> None:
        """Derive the row order now, if one is needed and the indices are in memory.

        A graph compiled before the first call would derive it anew at every call.
        """
        if self._ordered and self.weight.device.type != "meta":
            self.row_order(self.weight.device)

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> CompressedLinear:
        order, self._order = self._order, None
        super()._apply(fn, *args, **kwargs)
        moved = None if order is None else fn(order)
        # What to_empty or a move to the meta device leaves is no order.
        if (
            order is not None
            and type(moved) is Tensor
            and moved.device.type != "meta"
            and order.cpu().equal(moved.cpu())
        ):
            self._order = moved
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._order = None
        super()._load_from_state_dict(*args, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        h = self.lr_in(x)
        if not self._factorized:
            y = h
        elif len(self.parts) == 1:
            y = self.lr_out(h)
            if self._ordered:
                y = torch.cat([h, y], -1)
        else:
            emitted: list[Tensor] = []
            inner = h.split([part.width for part in self.parts], -1)
            for (_, form, _, suffix), h_part in zip(self.parts, inner, strict=True):
                if form != "pair":
                    emitted.append(h_part)
                if form != "dense":
                    emitted.append(getattr(self, f"lr_out{suffix}")(h_part))
            y = torch.cat(emitted, -1)
        if self._ordered:
            order = self.row_order(y.device)
            # On a CPU, gather with an expanded index is ten times faster than index_select along the last dimension,
            # but for a single token.
            y = y.index_select(-1, order) if y.numel() == len(order) else y.gather(-1, order.expand(y.shape))
        return y if self.bias is None else y + self.bias

    @torch.no_grad()
    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the weight (out_features, in_features) this layer stands for, multiplied in at least float32.

        Half-precision factors are multiplied in float32, others in float64 (float32 on devices without it); the product
        is cast once to `dtype`, by default that of the factors.
        """
        factor = self.lr_in.get_parameter("weight")
        half = factor.dtype.itemsize < 4 or factor.device.type == "mps"
        accurate = torch.float32 if half else torch.float64
        emitted: list[Tensor] = []
        inner = factor.to(accurate).split([part.width for part in self.parts])
        for (_, form, _, suffix), b in zip(self.parts, inner, strict=True):
            if form != "pair":
                emitted.append(b)
            if form != "dense":
                emitted.append(self.get_parameter(f"lr_out{suffix}.weight").to(accurate) @ b)
        weight = torch.cat(emitted)
        if self._ordered:
            weight = weight[self.row_order(weight.device)]
        return weight.to(dtype or factor.dtype)

    def extra_repr(self) -> str:
        """Shape and parts, as ``print(model)`` shows them."""
        parts = ", ".join(f"{part.rows}:{part.format}:{part.width}" for part in self.parts)
        bias = self.bias is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}, parts={parts}"


def _width(part: Mapping[str, Any]) -> int:
    """Count the rows that a part takes in ``lr_in``."""
    return int(part["rows"] if part["format"] == "dense" else part["rank"])


class Heads(NamedTuple):
    """How the heads of a `CompressedAttention` divide its projections: its entry in the config, its children's names.

    ``o`` is empty if the output projection lies outside the attention module, which then leaves it to its parent.
    """

    heads: int
    kv_heads: int
    size: int
    query_key: int
    value: int
    rotary: bool
    interleaved: bool
    q: str
    k: str
    v: str
    o: str


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


class CompressedAttention(nn.Module):
    """Self-attention whose queries and keys have one width, and its values another, smaller than the stock head's size.

    It is mixed into a family's own attention class, whose attributes, children and place in the model stay; only the
    projections are smaller. With dimensions D of a head kept in q and k, and the kept rows of v and columns of o
    anywhere, it equals the stock attention whose other rows of q, k, v and columns of o are zero.

    Notes
    -----
    ``lr_rotary`` (kv_heads, query_key), int32 (int64 in version 1), is there if the family rotates queries and keys
    and a head keeps but some dimensions or keeps them in another order. It says which dimension of the stock head each
    kept one was, for each key-value head and its queries: the first half holds the first members i of the kept pairs,
    the second half their partners, i + rotary / 2. Dimensions past the rotary ones are not rotated; any two of them
    make a pair.
    """

    config: Any
    layer_idx: int
    scaling: float
    lr_heads: Heads
    lr_rotary: Tensor
    lr_stock_class: ClassVar[type[nn.Module]]

    def forward(
        self,
        hidden_states: Tensor,
        *,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Any = None,
        cache: Any = None,
        past_key_values: Any = None,
        layer_past: Any = None,
        cache_position: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Map (batch, tokens, hidden) to the output (batch, tokens, hidden) and, where known, attention weights.

        The cache has another name in every few versions of transformers and in some families; all are taken. What
        else comes must be in `PASSED_ON`, or be a parameter of the attention function that is in use.

        Raises
        ------
        TypeError
            Another argument is given: ignored, it could change the result.
        ValueError
            It is asked to attend to another sequence.
        """
        if encoder_hidden_states is not None:
            raise ValueError("a compressed attention attends to its own sequence only, got encoder_hidden_states")
        if unknown := {name for name, value in kwargs.items() if value is not None} - PASSED_ON:
            self._refuse(unknown)
        query, key, value = (states.transpose(1, 2) for states in self._project(hidden_states))
        if isinstance(norm := getattr(self, "q_norm", None), nn.Module):
            query, key = norm(query), self.get_submodule("k_norm")(key)
        if position_embeddings is not None:
            query, key = self._rotate(query, key, *position_embeddings)
        cache = next((given for given in (cache, past_key_values, layer_past) if given is not None), None)
        if isinstance(cache, EncoderDecoderCache):
            cache = cache.self_attention_cache
        if cache is not None:
            # Transformers 4 tells a static cache where the new tokens belong; 5 has no such argument.
            places = () if cache_position is None else ({"cache_position": cache_position},)
            key, value = cache.update(key, value, self.layer_idx, *places)
        implementation = self.config._attn_implementation
        if implementation == "eager" and getattr(self, "reorder_and_upcast_attn", False):  # GPT-2
            context, weights = getattr(self, "_upcast_and_reordered_attn")(query, key, value, attention_mask)  # noqa: B009
        else:
            context, weights = _attention_function(self.lr_stock_class, implementation)(
                self,
                *_equally_wide(query, key, value, implementation),
                attention_mask,
                dropout=self._dropout() if self.training else 0.0,
                scaling=self.scaling,
                **self._limits(),
                **kwargs,
            )
        context = context[..., : self.lr_heads.value].reshape(*hidden_states.shape[:-1], -1)
        if self.lr_heads.o:
            context = getattr(self, self.lr_heads.o)(context)
        if isinstance(dropout := getattr(self, "resid_dropout", None), nn.Module):
            context = dropout(context)
        return context, weights

    def _refuse(self, names: Iterable[str]) -> None:
        """Raise for the arguments among these that the attention function in use does not name."""
        attend = _attention_function(self.lr_stock_class, self.config._attn_implementation)
        if unknown := sorted(set(names) - set(inspect.signature(attend).parameters)):
            raise TypeError(
                f"{type(self).__name__} got {', '.join(unknown)}, which compressed attention does not take, with "
                f"transformers {transformers.__version__}; ignored, it could change the result. Leave it out, or "
                "update lowrank_compress"
            )

    def _project(self, hidden: Tensor) -> tuple[Tensor, ...]:
        """Return queries, keys and values, each (batch, tokens, heads, width)."""
        heads, kv_heads, _, wide, narrow, _, interleaved, q, k, v, _ = self.lr_heads
        if q != k:
            parts = tuple(getattr(self, name)(hidden) for name in (q, k, v))
        elif interleaved:
            return getattr(self, q)(hidden).unflatten(-1, (heads, -1)).split([wide, wide, narrow], -1)
        else:
            parts = getattr(self, q)(hidden).split([heads * wide, kv_heads * wide, kv_heads * narrow], -1)
        return tuple(x.unflatten(-1, (n, -1)) for x, n in zip(parts, (heads, kv_heads, kv_heads), strict=True))

    def _rotate(self, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Rotate (batch, heads, tokens, query_key); `cos` and `sin` are the model's, (batch, tokens, rotary)."""
        heads, rotary = self.lr_heads, cos.shape[-1]
        if not heads.rotary:
            return _family(self.lr_stock_class).apply_rotary_pos_emb(query, key, cos, sin)
        first = self.lr_rotary[:, : heads.query_key // 2].long()
        cos, sin = cos[..., : rotary // 2], sin[..., : rotary // 2]
        if rotary < heads.size:
            # Pairs that are not rotated look up one more column: the cosine and sine of no rotation.
            first = first.clamp(max=rotary // 2)
            cos, sin = nn.functional.pad(cos, (0, 1), value=1.0), nn.functional.pad(sin, (0, 1))
        cos, sin = (table[..., first].transpose(1, 2).unsqueeze(2) for table in (cos, sin))

        def turn(states: Tensor) -> Tensor:
            one, two = states.unflatten(1, (heads.kv_heads, -1)).chunk(2, -1)
            return torch.cat([one * cos - two * sin, two * cos + one * sin], -1).flatten(1, 2)

        return turn(query), turn(key)

    def _dropout(self) -> float:
        """Return the probability with which the stock module drops attention weights."""
        for name in ("attention_dropout", "attn_dropout", "dropout"):
            value = getattr(self, name, None)
            if value is not None:
                return float(getattr(value, "p", value))
        return 0.0

    def _limits(self) -> dict[str, Any]:
        """Return what the stock module tells the attention function about its window and its soft cap."""
        # Mistral and Phi-3 ask their config; other families' configs may have come by a window that they ignore.
        known = self.config if hasattr(type(self.config), "sliding_window") else None
        limits = {"sliding_window": getattr(self, "sliding_window", getattr(known, "sliding_window", None))}
        # Gemma 3 has the attribute, but does not use it.
        if not hasattr(self, "q_norm"):
            limits["softcap"] = getattr(self, "attn_logit_softcapping", None)
        return {name: value for name, value in limits.items() if value is not None}

    def stock_rows(self) -> dict[str, Tensor]:
        """Return, for each of q, k, v or for the fused one, which row of the stock projection each row was."""
        heads, kv_heads, size, query_key, value, rotary, interleaved, q, k, v, _ = self.lr_heads
        device = getattr(self, v).weight.device
        keys = self.lr_rotary.long() if rotary else torch.arange(query_key, device=device).expand(kv_heads, -1)
        queries = keys.repeat_interleave(heads // kv_heads, 0)
        values = torch.arange(value, device=device).expand(kv_heads, -1)

        def spread(within: Tensor, step: int) -> Tensor:
            return (within + step * torch.arange(len(within), device=within.device)[:, None]).flatten()

        if interleaved:
            return {q: spread(torch.cat([queries, size + keys, 2 * size + values], 1), 3 * size)}
        rows = [spread(within, size) for within in (queries, keys, values)]
        if q == k:
            return {q: torch.cat([rows[0], heads * size + rows[1], (heads + kv_heads) * size + rows[2]])}
        return dict(zip((q, k, v), rows, strict=True))

    def extra_repr(self) -> str:
        """Widths, as ``print(model)`` shows them."""
        heads = self.lr_heads
        return f"heads={heads.heads}, kv_heads={heads.kv_heads}, query_key={heads.query_key}, value={heads.value}"

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Its class has no name that pickle could look up.
        _, _, *state = super().__reduce_ex__(protocol)
        return (_blank_attention, (self.lr_stock_class,), *state)


def _equally_wide(query: Tensor, key: Tensor, value: Tensor, implementation: str) -> Sequence[Tensor]:
    """Pad queries and keys, or values, with zeros where that lets the attention function use a fused kernel."""
    states = (query, key, value)
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


def _attention_function(stock: type, implementation: str) -> Any:
    """Look up an attention function by name; transformers 4 has no `get_interface`."""
    # By way of the family: this file is imported before transformers has its table of attention functions.
    family = _family(stock)
    table = family.ALL_ATTENTION_FUNCTIONS
    if hasattr(table, "get_interface"):
        return table.get_interface(implementation, family.eager_attention_forward)
    return family.eager_attention_forward if implementation == "eager" else table[implementation]


def _family(stock: type) -> Any:
    """Return the modeling module that an attention class comes from."""
    return sys.modules[stock.__module__]


@functools.cache
def _compressed_class(stock: type[nn.Module]) -> type[CompressedAttention]:
    """Make the subclass of a family's attention class that computes with smaller projections."""
    return type(f"Compressed{stock.__name__}", (CompressedAttention, stock), {"lr_stock_class": stock})


def _blank_attention(stock: type[nn.Module]) -> CompressedAttention:
    """Make an attention without any attribute, for ``pickle`` and ``copy`` to fill."""
    made = _compressed_class(stock)
    return made.__new__(made)


class LowRankConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of a compressed checkpoint: alone it says how to build the modules.

    Parameters
    ----------
    modules : mapping, optional
        Module path to ``{"in_features", "out_features", "bias", "heads", "parts"}`` (see `CompressedLinear`).
    dense_shapes : mapping, optional
        Module path to ``[out, in]`` of linear layers that stay dense but are smaller than the model's config says; or
        ``[out, in, parts]`` if each of so many equal parts of the rows is.
    attention : mapping, optional
        Path of an attention module to ``{"heads", "kv_heads", "size", "query_key", "value", "rotary", "interleaved",
        "projections"}``: numbers of query and key-value heads, dimensions of a stock head, those kept in q and k and
        in v, whether there is an ``lr_rotary`` (see `CompressedAttention`), whether the fused weight emits q, k, v
        head by head, and the paths of ``"q"``, ``"k"``, ``"v"`` (thrice the same if fused) and ``"o"``. Projections
        that are smaller than stock have entries in `dense_shapes`, those with factors in `modules`.
    version : int
        That of the checkpoint, up to `VERSION`; what is saved again has the present one.
    factor_quantization : None
        Reserved for a quantization of the factors themselves.

    Raises
    ------
    ValueError
        If the version, a format or any other value is not one this code knows how to load.
    """

    def __init__(
        self,
        modules: Mapping[str, Mapping[str, Any]] | None = None,
        dense_shapes: Mapping[str, Sequence[int]] | None = None,
        attention: Mapping[str, Mapping[str, Any]] | None = None,
        version: int = VERSION,
        factor_quantization: None = None,
        quant_method: str = QUANT_METHOD,
        **unknown: Any,
    ) -> None:
        if quant_method != QUANT_METHOD:
            raise ValueError(f"expected quant_method {QUANT_METHOD!r}, got {quant_method!r}")
        if type(version) is not int or not 1 <= version <= VERSION:
            raise ValueError(
                f"this checkpoint is of low-rank format version {version!r}, but this code reads versions 1 to "
                f"{VERSION}: update lowrank_compress, or install the version that wrote the checkpoint"
            )
        if factor_quantization is not None or unknown:
            what = ", ".join(sorted(unknown)) or "factor_quantization"
            raise ValueError(
                f"the low-rank quantization_config uses {what}, unknown to this code: update lowrank_compress"
            )
        self.quant_method: Any = QUANT_METHOD
        self.version = VERSION
        self.factor_quantization = factor_quantization
        self.modules = {path: _checked(path, entry) for path, entry in (modules or {}).items()}
        self.dense_shapes = {path: [int(n) for n in shape] for path, shape in (dense_shapes or {}).items()}
        self.attention = {path: _checked_attention(path, entry) for path, entry in (attention or {}).items()}


def _checked(path: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    """Copy one module's entry, if it is one that `CompressedLinear` can be built from."""

    def refuse(problem: str) -> ValueError:
        return ValueError(f"quantization_config.modules[{path!r}]: {problem}")

    entry = {"heads": 1, **copy.deepcopy(dict(entry))}
    expected = {"in_features", "out_features", "bias", "heads", "parts"}
    if set(entry) != expected:
        raise refuse(f"expected the keys {sorted(expected)}, got {sorted(entry)}")
    for part in entry["parts"]:
        if set(part) != {"rows", "format", "rank"}:
            raise refuse(f"expected a part to have the keys rows, format and rank, got {part}")
        if part["format"] not in FORMATS:
            raise refuse(f"unknown format {part['format']!r}, expected one of {', '.join(FORMATS)}")
        limit = part["rows"] - 1 if part["format"] == "pivot" else part["rows"]
        if not 1 <= _width(part) <= limit:
            raise refuse(f"the rank of a {part['format']} part of {part['rows']} rows is from 1 to {limit}, got {part}")
        if part["rows"] % entry["heads"]:
            raise refuse(f"{part['rows']} rows cannot be shared by {entry['heads']} heads")
    rows = sum(part["rows"] for part in entry["parts"])
    if rows != entry["out_features"]:
        raise refuse(f"its parts have {rows} rows in all, out_features is {entry['out_features']}")
    return entry


def _checked_attention(path: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    """Copy one attention's entry, if it is one that `CompressedAttention` can compute with."""

    def refuse(problem: str) -> ValueError:
        return ValueError(f"quantization_config.attention[{path!r}]: {problem}")

    entry = copy.deepcopy(dict(entry))
    expected = {"heads", "kv_heads", "size", "query_key", "value", "rotary", "interleaved", "projections"}
    if set(entry) != expected:
        raise refuse(f"expected the keys {sorted(expected)}, got {sorted(entry)}")
    places = entry["projections"] = dict(entry["projections"])
    if set(places) != {"q", "k", "v", "o"}:
        raise refuse(f"expected the projections q, k, v and o, got {sorted(places)}")
    heads, kv_heads, size = entry["heads"], entry["kv_heads"], entry["size"]
    if not 1 <= kv_heads <= heads or heads % kv_heads:
        raise refuse(f"{heads} query heads cannot share {kv_heads} key-value heads")
    for name in ("query_key", "value"):
        if not 1 <= entry[name] <= size:
            raise refuse(f"{name} is from 1 to {size}, the size of a stock head, got {entry[name]}")
    if entry["rotary"] and entry["query_key"] % 2:
        raise refuse(f"rotary embeddings turn pairs of dimensions; query_key is {entry['query_key']}")
    fused = len({places["q"], places["k"], places["v"]})
    if fused == 2:
        raise refuse(f"q, k and v must have one path each, or the same, got {places}")
    if entry["interleaved"] and (fused == 3 or heads != kv_heads):
        raise refuse("only a fused weight with as many key-value heads as query heads can be interleaved")
    for role in "qkv":
        parent, _, leaf = places[role].rpartition(".")
        if parent != path or not leaf:
            raise refuse(f"{role} is at {places[role]}, expected it to be a child of {path}")
    if places["o"].startswith(f"{path}.") and "." in places["o"].removeprefix(f"{path}."):
        raise refuse(f"o is at {places['o']}, expected it to be a child of {path} or outside of it")
    return entry


def swap_modules(model: nn.Module, config: LowRankConfig) -> None:
    """Replace the modules that `config` names by uninitialised ones of its shapes, on their device and in their dtype.

    Attention modules stay the objects they are; they get a class that computes with smaller projections.

    Paths are those of the saved model. A model with a head and its base model differ by ``base_model_prefix``, so each
    path is looked up as it is, without and with that prefix.

    Raises
    ------
    ValueError
        If a path leads nowhere, or to a module that is not a linear layer of the shape that the entry replaces, or not
        an attention with such heads.
    """
    for path, (rows, columns, *parts) in config.dense_shapes.items():
        name, old = _find(model, path)
        stock = _stock(path, old)._replace(parts=parts[0] if parts else 1)
        new = _dense_module(Stock(rows, columns, stock.bias, stock.conv1d), old.weight)
        new.lr_stock = stock
        _put(model, name, new)
    for path, entry in config.modules.items():
        name, old = _find(model, path)
        stock = _stock(path, old)
        shape = (entry["out_features"], entry["in_features"])
        if shape != _shape(old):
            raise ValueError(
                f"{path} is {_shape(old)} (out, in) in the model, but {shape} in the checkpoint's low-rank config"
            )
        new = CompressedLinear(**entry, stock=stock, device=old.weight.device, dtype=old.weight.dtype)
        _put(model, name, new.train(old.training))
    for path, entry in config.attention.items():
        _swap_attention(model, path, entry)


def _swap_attention(model: nn.Module, path: str, entry: Mapping[str, Any]) -> None:
    """Let the attention at `path` compute with the projections that are in place."""
    module = _find(model, path)[1]
    places = entry["projections"]
    children = {role: p.removeprefix(f"{path}.") if p.startswith(f"{path}.") else "" for role, p in places.items()}
    fields: dict[str, Any] = {name: value for name, value in entry.items() if name != "projections"}
    fields.update(children)
    heads = Heads(**fields)
    family = _family(type(module))
    rotates = hasattr(family, "apply_rotary_pos_emb")
    problem = ""
    if not hasattr(family, "eager_attention_forward") or not hasattr(module, "scaling"):
        problem = f"a {type(module).__name__} is not an attention that can be made smaller"
    elif getattr(module, "num_key_value_groups", heads.heads // heads.kv_heads) != heads.heads // heads.kv_heads:
        problem = f"the model shares a key-value head among {module.num_key_value_groups} heads"
    elif heads.rotary and not rotates:
        problem = f"a {type(module).__name__} has no rotary embedding"
    elif hasattr(module, "q_norm") and (heads.rotary or heads.query_key < heads.size):
        problem = "queries and keys with norms of their own must keep their heads as they are"
    elif rotates and heads.query_key < heads.size and not heads.rotary:
        problem = "queries and keys that are rotated and smaller need rotary indices"
    if problem:
        raise ValueError(f"{path} of the low-rank config: {problem}")
    linear = {role: _find(model, place)[1] for role, place in places.items()}

    def check(role: str, side: int, kept: int, stock: int) -> None:
        found = _shape(linear[role])[side], _stock(places[role], linear[role])[side]
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
        output, stock = linear["o"], _stock(places["o"], linear["o"])._replace(groups=heads.heads)
        setattr(output, "stock" if isinstance(output, CompressedLinear) else "lr_stock", stock)
    module.__class__ = _compressed_class(type(module))
    module.lr_heads = heads
    if heads.rotary:
        index = torch.zeros(heads.kv_heads, heads.query_key, dtype=INDEX_DTYPE, device=linear["q"].weight.device)
        module.register_buffer("lr_rotary", index)


def check_indices(model: nn.Module) -> None:
    """Make sure that stored indices name rows that there are, each once: others would compute something else.

    Raises
    ------
    ValueError
        They do not.
    """
    for path, module in model.named_modules():
        if isinstance(module, CompressedLinear):
            rows = {f"lr_index{part.suffix}": part.rows for part in module.parts if part.format == "pivot"}
        elif isinstance(module, CompressedAttention) and module.lr_heads.rotary:
            rows = {"lr_rotary": module.lr_heads.size}
        else:
            continue
        for name, count in rows.items():
            stored = module.get_buffer(name)
            if stored.device.type == "meta" or type(stored) is not Tensor:
                continue
            index = stored.long()
            # Pivot rows come in their order; those of a head's pairs in any.
            steps = (index if name != "lr_rotary" else index.sort(-1).values).diff()
            if int(index.min()) < 0 or int(index.max()) >= count or not bool((steps > 0).all()):
                raise ValueError(f"{path}.{name} does not name distinct rows of {count}, in order: it is damaged")


def _find(model: nn.Module, path: str) -> tuple[str, Any]:
    """Look up the module that a saved path means: its path here, and itself."""
    prefix = getattr(model, "base_model_prefix", "")
    for name in (path, path.removeprefix(f"{prefix}."), f"{prefix}.{path}"):
        try:
            return name, model.get_submodule(name)
        except AttributeError:
            continue
    raise ValueError(
        f"the low-rank config names the module {path}, which {type(model).__name__} does not have"
        + (f", with or without the prefix {prefix!r}" if prefix else "")
    )


def _stock(path: str, module: nn.Module) -> Stock:
    """Say what a linear layer, compressed or not, is in the stock model."""
    if isinstance(module, CompressedLinear):
        return module.stock
    if isinstance(module, nn.Linear):
        own = Stock(module.out_features, module.in_features, module.bias is not None, False)
    elif isinstance(module, Conv1D):
        own = Stock(module.weight.shape[1], module.weight.shape[0], True, True)
    else:
        raise ValueError(f"{path} of the low-rank config is a {type(module).__name__}, expected nn.Linear or Conv1D")
    return getattr(module, "lr_stock", own)


def _shape(module: Any) -> tuple[int, int]:
    """Return (out, in) of a linear layer, compressed or not."""
    if isinstance(module, Conv1D):
        return module.weight.shape[1], module.weight.shape[0]
    return module.out_features, module.in_features


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def _dense_module(stock: Stock, like: Tensor) -> Any:
    """Make an uninitialised ``nn.Linear`` or ``Conv1D`` of that shape, with the device and dtype of `like`."""
    if stock.conv1d:
        with torch.device("meta"):
            conv = Conv1D(stock.out_features, stock.in_features).to(like.dtype)
        return conv if like.device.type == "meta" else conv.to_empty(device=like.device)
    return nn.utils.skip_init(
        nn.Linear, stock.in_features, stock.out_features, bias=stock.bias, device=like.device, dtype=like.dtype
    )


@torch.no_grad()
def restore_modules(model: nn.Module) -> list[str]:
    """Put stock modules in the place of all that `swap_modules` replaced, in `model` or a part of it.

    A module that is smaller than the stock one is padded with zeros, where its attention says or else at its end,
    which leaves the function of an attention or MLP unchanged because its neighbours are padded alike.

    Returns
    -------
    list of str
        Names of the modules whose tensors are new.

    Raises
    ------
    ValueError
        If a module has a bias that the stock one has no place for, or is not in memory.
    """
    attentions = [(name, module) for name, module in model.named_modules() if isinstance(module, CompressedAttention)]
    places = {
        f"{name}.{leaf}" if name else leaf: rows
        for name, attention in attentions
        for leaf, rows in attention.stock_rows().items()
    }
    found: list[tuple[str, Any, Stock]] = []
    for name, old in model.named_modules():
        if not (isinstance(old, CompressedLinear) or hasattr(old, "lr_stock") or name in places):
            continue
        stock = _stock(name, old)
        if old.bias is not None and not stock.bias:
            raise ValueError(f"{name} has a bias of its own, which a stock {type(model).__name__} has no place for")
        if any(tensor.device.type == "meta" for tensor in old.parameters()):
            raise ValueError(f"the weights of {name} are not in memory: load the model without offloading")
        found.append((name, old, stock))
    for name, old, stock in found:
        if isinstance(old, CompressedLinear):
            weight = old.dense_weight()
        else:
            weight = old.weight.T if stock.conv1d else old.weight
        kept = torch.arange(stock.out_features).view(stock.parts, -1)[:, : len(weight) // stock.parts].flatten()
        rows = places.get(name, kept).to(weight.device)
        weight = weight.unflatten(1, (stock.groups, -1))
        whole = weight.new_zeros(stock.out_features, stock.groups, stock.in_features // stock.groups)
        whole[rows, :, : weight.shape[2]] = weight
        new = _dense_module(stock, weight).train(old.training)
        (new.weight.T if stock.conv1d else new.weight).copy_(whole.flatten(1))
        if stock.bias:
            new.bias.zero_()
            if old.bias is not None:
                new.bias[rows] = old.bias
        _put(model, name, new)
    for _, attention in attentions:
        attention.__dict__.pop("lr_heads")
        attention._buffers.pop("lr_rotary", None)
        attention.__class__ = attention.lr_stock_class  # pyright: ignore[reportAttributeAccessIssue]
    return [name for name, _, _ in found]


class LowRankQuantizer(HfQuantizer):
    """Lets ``from_pretrained`` build a compressed model; afterwards the model is an ordinary floating-point one."""

    requires_calibration = True
    quantization_config: LowRankConfig

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        swap_modules(model, self.quantization_config)
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for module in model.modules():
            if isinstance(module, transformers.PreTrainedModel):
                # Else .half() and .float() raise; no weight is quantized.
                module.__dict__["is_quantized"] = False
                module.config.__dict__["_is_quantized"] = False
            for name, buffer in list(module._buffers.items()):
                # Checkpoints of version 1 have wider ones.
                if name.startswith(("lr_index", "lr_rotary")) and buffer is not None and buffer.device.type != "meta":
                    module._buffers[name] = buffer.to(INDEX_DTYPE)
        check_indices(model)
        for module in model.modules():
            if isinstance(module, CompressedLinear):
                module.remember_order()
        model.save_pretrained = _Saver(model)
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> Any:
        """Say that ``save_pretrained`` may write the factors."""
        return True

    @property
    def is_trainable(self) -> Any:
        """True: the factors are ordinary parameters."""
        return True

    @property
    def is_compileable(self) -> bool:
        """True: the layer is two matrix products."""
        return True

    def dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        """Turn `model` in place into the stock dense model, in the dtype of its factors or in `dtype`; return it."""
        model = self._dequantize(model)
        for owner, name in ((model, "hf_quantizer"), (model, "quantization_method"), (model, "save_pretrained")):
            owner.__dict__.pop(name, None)
        for name in ("quantization_config", "auto_map", "_pre_quantization_dtype"):  # the last: transformers 4
            model.config.__dict__.pop(name, None)
        model.is_quantized = False
        return model if dtype is None else model.to(dtype)

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        restore_modules(model)
        return model


class _Saver:
    """A loaded model's ``save_pretrained`` that also writes the remote code: the copy loads as the original did.

    It stands in the model's ``__dict__``. Its reference is weak, so that a deleted model frees its memory at once.
    """

    def __init__(self, model: Any) -> None:
        self.model = weakref.ref(model)

    def __call__(self, save_directory: Any, is_main_process: bool = True, *args: Any, **kwargs: Any) -> Any:
        model = self.model()
        if model is None:
            raise ReferenceError("the model of this save_pretrained is gone: keep it in a variable until it is saved")
        model.config.auto_map = remote_code_entries(model.config)
        if is_main_process:
            write_remote_code(save_directory)
        return type(model).save_pretrained(model, save_directory, is_main_process, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Saver:
        return _Saver(memo.get(id(self.model()), self.model()))

    def __reduce__(self) -> Any:
        return _Saver, (self.model(),)


class _Remote:
    """What the auto classes call in a checkpoint's copy of this file; hands over to the native class."""

    auto_class: ClassVar[str]

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Do nothing: the native class stays what it is."""

    @classmethod
    def from_pretrained(cls, path: Any, *args: Any, **kwargs: Any) -> Any:
        """Register this copy's quantizer, unless the package's is, and load with the native class."""
        register()
        # An auto class that has found an adapter hands over the base model's path; the native one finds both again.
        adapter_kwargs = dict(kwargs.pop("adapter_kwargs", None) or {})
        path = adapter_kwargs.pop("_adapter_model_path", path)
        kwargs |= {"adapter_kwargs": adapter_kwargs, "trust_remote_code": False}
        return getattr(transformers, cls.auto_class).from_pretrained(path, *args, **kwargs)

    @classmethod
    def _from_config(cls, config: Any, **kwargs: Any) -> Any:
        return getattr(transformers, cls.auto_class).from_config(config, **{**kwargs, "trust_remote_code": False})


class LowRankModel(_Remote):
    """Remote code for ``AutoModel``."""

    auto_class = "AutoModel"


class LowRankForCausalLM(_Remote):
    """Remote code for ``AutoModelForCausalLM``."""

    auto_class = "AutoModelForCausalLM"


class LowRankForMaskedLM(_Remote):
    """Remote code for ``AutoModelForMaskedLM``."""

    auto_class = "AutoModelForMaskedLM"


class LowRankForSequenceClassification(_Remote):
    """Remote code for ``AutoModelForSequenceClassification``."""

    auto_class = "AutoModelForSequenceClassification"


class LowRankForTokenClassification(_Remote):
    """Remote code for ``AutoModelForTokenClassification``."""

    auto_class = "AutoModelForTokenClassification"


class LowRankForQuestionAnswering(_Remote):
    """Remote code for ``AutoModelForQuestionAnswering``."""

    auto_class = "AutoModelForQuestionAnswering"


def remote_code_entries(config: Any) -> dict[str, str]:
    """Build the ``auto_map`` of a compressed checkpoint: the auto classes that know `config`'s type."""
    return {
        remote.auto_class: f"{Path(REMOTE_FILE).stem}.{remote.__name__}"
        for remote in _Remote.__subclasses__()
        if type(config) in getattr(transformers, remote.auto_class)._model_mapping
    }


def write_remote_code(directory: Any) -> Path:
    """Copy this file, byte for byte, into a checkpoint's directory."""
    Path(directory).mkdir(parents=True, exist_ok=True)
    target = Path(directory) / REMOTE_FILE
    if target.resolve() != Path(__file__).resolve():
        shutil.copyfile(__file__, target)
    return target


def register() -> None:
    """Make transformers load checkpoints with this file's quantizer, unless that of the package is already in place.

    Calling it again does nothing; of several checkpoints' copies the one that loads now is in place.
    """
    present = AUTO_QUANTIZER_MAPPING.get(QUANT_METHOD)
    if present is not None and present.__name__ != LowRankQuantizer.__name__:
        raise RuntimeError(f"another quantizer, {present}, is already registered as {QUANT_METHOD!r}")
    if present is None or present.__module__ != PACKAGE:
        AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = LowRankConfig
        AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = LowRankQuantizer


register()
