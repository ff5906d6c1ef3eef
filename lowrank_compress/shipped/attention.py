"""The attention whose heads are narrower than stock."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable
from operator import attrgetter
from typing import Any, ClassVar, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from transformers.cache_utils import EncoderDecoderCache

from .family import PASSED_ON, attention_function, equally_wide, family
from .traits import Traits


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
    traits: Traits


class CompressedAttention(nn.Module):
    """Self-attention whose queries and keys have one width, and its values another, smaller than the stock head's size.

    It is mixed into a family's own attention class, whose attributes, children and place in the model stay; only the
    projections are smaller. With dimensions D of a head kept in q and k, and the kept rows of v and columns of o
    anywhere, it equals the stock attention whose other rows of q, k, v and columns of o are zero. What the family's
    attention does beyond the usual, its `Traits` say.

    Notes
    -----
    ``lr_rotary`` (kv_heads, query_key), int32 (int64 in version 1), is there if the family rotates queries and keys
    and a head keeps but some dimensions or keeps them in another order. It says which dimension of the stock head each
    kept one was, for each key-value head and its queries: the first half holds the first members i of the kept pairs,
    the second half their partners, i + rotary / 2. Dimensions past the rotary ones are not rotated; any two of them
    make a pair. So do dimensions of a layer that does not rotate at all.
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
        traits = self.lr_heads.traits
        cache = next((given for given in (cache, past_key_values, layer_past) if given is not None), None)
        if isinstance(cache, EncoderDecoderCache):
            cache = cache.self_attention_cache
        # Transformers 4 tells a static cache where the new tokens belong; 5 has no such argument.
        places = () if cache_position is None else ({"cache_position": cache_position},)
        if traits.rotates and not getattr(self, traits.rotates):
            position_embeddings = None
        query, key, value, attention_mask = self._states(
            hidden_states, position_embeddings, attention_mask, cache, places
        )
        implementation = self.config._attn_implementation
        if traits.reordered and implementation == "eager" and getattr(self, traits.reordered):
            context, weights = getattr(self, "_upcast_and_reordered_attn")(query, key, value, attention_mask)  # noqa: B009
        else:
            # Under this very name, and called once, vLLM looks for it in the source.
            ALL_ATTENTION_FUNCTIONS = {implementation: attention_function(self.lr_stock_class, implementation)}
            attend = ALL_ATTENTION_FUNCTIONS[implementation]
            context, weights = attend(
                self,
                *equally_wide(query, key, value, implementation, self.lr_heads.size),
                attention_mask,
                dropout=self._dropout() if self.training else 0.0,
                scaling=self.scaling,
                **self._limits(),
                **kwargs,
            )
        # Some attention functions join the heads themselves.
        context = context.reshape(*hidden_states.shape[:-1], self.lr_heads.heads, -1)
        context = context[..., : self.lr_heads.value].flatten(-2)
        if self.lr_heads.o:
            context = getattr(self, self.lr_heads.o)(context)
        if traits.output_dropout:
            context = getattr(self, traits.output_dropout)(context)
        return context, weights

    def _refuse(self, names: Iterable[str]) -> None:
        """Raise for the arguments among these that the attention function in use does not name."""
        attend = attention_function(self.lr_stock_class, self.config._attn_implementation)
        if unknown := sorted(set(names) - set(inspect.signature(attend).parameters)):
            raise TypeError(
                f"{type(self).__name__} got {', '.join(unknown)}, which compressed attention does not take, with "
                f"transformers {transformers.__version__}; ignored, it could change the result. Leave it out, or "
                "update lowrank_compress"
            )

    def _states(
        self,
        hidden: Tensor,
        tables: tuple[Tensor, Tensor] | None,
        mask: Any,
        cache: Any,
        places: tuple[Any, ...],
    ) -> tuple[Tensor, Tensor, Tensor, Any]:
        """Make queries, and the keys and values of all tokens that they may attend to, each by head; and their mask.

        `tables` are the cosines and sines of the new tokens, None where the layer does not rotate.
        """
        query, key, value = (states.transpose(1, 2) for states in self._project(hidden))
        if tables is not None:
            query, key = self._rotate(query, key, *tables)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx, *places)
        return query, key, value, mask

    def _project(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values, each (batch, tokens, heads, width), normalised if the family does so."""
        names, traits = self.lr_heads[7:10], self.lr_heads.traits
        query, key, value = self._parted(*(getattr(self, name)(hidden) for name in dict.fromkeys(names)))
        return self._normalised(traits.query_norm, query), self._normalised(traits.key_norm, key), value

    def _parted(self, *outputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Part what the projections, or the fused one, emit (…, rows) by what it is: each (…, heads, width)."""
        heads, kv_heads, _, wide, narrow, _, interleaved, *_ = self.lr_heads
        if len(outputs) == 1 and interleaved:
            query, key, value = outputs[0].unflatten(-1, (heads, -1)).split([wide, wide, narrow], -1)
            return query, key, value
        if len(outputs) == 1:
            outputs = outputs[0].split([heads * wide, kv_heads * wide, kv_heads * narrow], -1)
        query, key, value = (
            x.unflatten(-1, (n, -1)) for x, n in zip(outputs, (heads, kv_heads, kv_heads), strict=True)
        )
        return query, key, value

    def _normalised(self, name: str, states: Tensor) -> Tensor:
        """Normalise (…, heads, width) by the module of that name; or not, if the name is empty."""
        if not name:
            return states
        norm = getattr(self, name)
        return norm(states.flatten(-2)).view(states.shape) if self.lr_heads.traits.whole_norms else norm(states)

    def _rotate(self, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Rotate (batch, heads, tokens, query_key); `cos` and `sin` are (batch, tokens, rotary), or half of that."""
        if not self.lr_heads.rotary:
            return family(self.lr_stock_class).apply_rotary_pos_emb(query, key, cos, sin)
        return self._kept_turned(query, cos, sin), self._kept_turned(key, cos, sin)

    def _kept_turned(self, states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotate the kept dimensions of (batch, heads, tokens, query_key), each pair by its own frequency."""
        heads, rotary = self.lr_heads, cos.shape[-1] * (2 if self.lr_heads.traits.halved_tables else 1)
        first = self.lr_rotary[:, : heads.query_key // 2].long()
        cos, sin = cos[..., : rotary // 2], sin[..., : rotary // 2]
        if rotary < heads.size:
            # Pairs that are not rotated look up one more column: the cosine and sine of no rotation.
            first = first.clamp(max=rotary // 2)
            cos, sin = nn.functional.pad(cos, (0, 1), value=1.0), nn.functional.pad(sin, (0, 1))
        cos, sin = (table[..., first].transpose(1, 2).unsqueeze(2) for table in (cos, sin))
        one, two = states.unflatten(1, (heads.kv_heads, -1)).chunk(2, -1)
        return torch.cat([one * cos - two * sin, two * cos + one * sin], -1).flatten(1, 2)

    def _dropout(self) -> float:
        """Return the probability with which the stock module drops attention weights."""
        name = self.lr_heads.traits.dropout
        value = getattr(self, name) if name else 0.0
        return float(getattr(value, "p", value))

    def _limits(self) -> dict[str, Any]:
        """Return what the stock module tells the attention function about its window, soft cap and sinks."""
        traits = self.lr_heads.traits
        places = {"sliding_window": traits.window, "softcap": traits.soft_cap, "s_aux": traits.sinks}
        limits = {name: attrgetter(place)(self) for name, place in places.items() if place}
        return {name: value for name, value in limits.items() if value is not None}

    def stock_rows(self) -> dict[str, Tensor]:
        """Return, for each of q, k, v or for the fused one, which row of the stock projection each row was."""
        heads, kv_heads, size, query_key, value, rotary, interleaved, q, k, v, *_ = self.lr_heads
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


@functools.cache
def compressed_class(stock: type[nn.Module]) -> type[CompressedAttention]:
    """Make the subclass of a family's attention class that computes with smaller projections."""
    return type(f"Compressed{stock.__name__}", (CompressedAttention, stock), {"lr_stock_class": stock})


def _blank_attention(stock: type[nn.Module]) -> CompressedAttention:
    """Make an attention without any attribute, for ``pickle`` and ``copy`` to fill."""
    made = compressed_class(stock)
    return made.__new__(made)
