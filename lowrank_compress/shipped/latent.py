"""The attention whose cache keeps fewer numbers a token than keys and values have."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .attention import CompressedAttention
from .cachelayer import windowed

# Attention functions that take a mask of any form.
MASKED = ("sdpa", "eager")
# Rotary embeddings whose tables depend on how long the sequence is.
LENGTH_DEPENDENT = ("dynamic", "longrope")


class Latent(NamedTuple):
    """What a `LatentAttention` keeps in its cache: its entry in the config.

    Of each token `rank` numbers; and exact keys and values of so many of the last tokens, the present one among them,
    as `window` says, 0 for none.
    """

    rank: int
    window: int


class LatentAttention(CompressedAttention):
    """Self-attention that caches z = B x of each token, and rebuilds keys and values from it: [k; v] = A z + b.

    B (rank, hidden) is ``lr_latent``, A (kv_heads · (query_key + value), rank) ``lr_rebuild``, keys before values, of
    heads that may be narrower than stock; the biases are those of the projections. Keys are normalised and rotated once
    they are rebuilt. Without a window the projections emit nothing but their biases (`Rebuilt`). With one they are
    whole, and a token attends to exact keys and values of the last `Latent.window` tokens, itself among them, and to
    rebuilt ones of those before; a forward pass without a cache does the same (CSKV, 2024, section 3, keeps such a
    window; there keys and values are factored apart).

    Notes
    -----
    Rotation depends on the distance of two tokens alone, so that beside a cache tokens are counted as they lie in it.
    A stock cache, of any kind, keeps z, cut in two halves, where it would keep keys and values. One that quantizes in
    groups of numbers keeps some numbers of z twice, so that its groups divide each half.
    """

    lr_latent: nn.Module
    lr_rebuild: nn.Module
    lr_remembered: Latent
    lr_turning: tuple[nn.Module, ...]

    def _states(
        self,
        hidden: Tensor,
        tables: tuple[Tensor, Tensor] | None,
        mask: Any,
        cache: Any,
        places: tuple[Any, ...],
    ) -> tuple[Tensor, Tensor, Tensor, Any]:
        query, *exact = self._project(hidden)
        query, new = query.transpose(1, 2), hidden.shape[1]
        latent, past = self.lr_latent(hidden), 0
        if cache is not None:
            past = cache.get_seq_length(self.layer_idx)
            past = past.clone() if isinstance(past, Tensor) else past  # a static cache changes it in place
            rank, whole = latent.shape[-1], _filled(latent, cache, self.layer_idx)
            halves = whole.unsqueeze(1).tensor_split(2, -1)
            latent = torch.cat(cache.update(*halves, self.layer_idx, *places), -1).squeeze(1)[..., :rank]
        counted = past + torch.arange(new, device=hidden.device)
        of_new = of_all = tables
        if tables is not None and cache is not None:
            everywhere = torch.arange(latent.shape[1], device=hidden.device)[None]
            of_all = self.lr_turning[0](hidden, everywhere)
            of_new = tuple(table[:, counted] for table in of_all)
        query = self._turned(query, of_new)
        if not self.lr_remembered.window:
            return query, *self._rebuilt(latent, of_all), mask
        key, value = self._turned(exact[0].transpose(1, 2), of_new), exact[1].transpose(1, 2)
        if cache is not None:
            key, value = windowed(cache, self.layer_idx).extended(key, value, self.lr_remembered.window)
        held = key.shape[2]
        if new == 1 and isinstance(past, int) and latent.shape[1] == past + 1:
            # A cache that grows, and all that is exact is within the window: the mask is that of a stock cache.
            older = latent.shape[1] - held
            of_older = None if of_all is None else tuple(table[:, :older] for table in of_all)
            rebuilt = self._rebuilt(latent[:, :older], of_older)
        else:
            mask = self._masks(mask, counted, latent.shape[1], held, query.dtype)
            rebuilt = self._rebuilt(latent, of_all)
        return query, torch.cat([rebuilt[0], key], 2), torch.cat([rebuilt[1], value], 2), mask

    def _rebuilt(self, latent: Tensor, tables: tuple[Tensor, ...] | None) -> tuple[Tensor, Tensor]:
        """Rebuild keys and values, each (batch, kv_heads, tokens, size), of latents (batch, tokens, rank)."""
        both = self.lr_rebuild(latent).split(self._widths(), -1)
        key, value = (states.unflatten(-1, (self.lr_heads.kv_heads, -1)) for states in both)
        of_key, of_value = self._biases()
        key = key if of_key is None else key + of_key
        value = value if of_value is None else value + of_value
        key = self._normalised(self.lr_heads.traits.key_norm, key).transpose(1, 2)
        return self._turned(key, tables), value.transpose(1, 2)

    def _widths(self) -> tuple[int, int]:
        """Return how many rows keys have, and values, of all heads together."""
        heads = self.lr_heads
        return heads.kv_heads * heads.query_key, heads.kv_heads * heads.value

    def _turned(self, states: Tensor, tables: tuple[Tensor, ...] | None) -> Tensor:
        """Rotate queries or keys (batch, heads, tokens, query_key) by tables (batch, tokens, rotary), if any."""
        if tables is None or not self.lr_heads.rotary:
            return turned(states, tables)
        return self._kept_turned(states, *tables)

    def _biases(self) -> tuple[Tensor | None, Tensor | None]:
        """Return the biases of keys and of values, each (kv_heads, size) or None."""
        heads = self.lr_heads
        if heads.q == heads.k:
            bias = getattr(self, heads.q).bias
            return (None, None) if bias is None else self._parted(bias)[1:]
        key, value = (getattr(self, name).bias for name in (heads.k, heads.v))
        return (
            None if key is None else key.view(heads.kv_heads, -1),
            None if value is None else value.view(heads.kv_heads, -1),
        )

    def _is_absent(self, mask: Any) -> bool:
        """Whether there is no mask; with a window it must be one that can be cut.

        Raises
        ------
        ValueError
            It is not.
        """
        implementation = self.config._attn_implementation
        if implementation not in MASKED or not (mask is None or (isinstance(mask, Tensor) and mask.ndim == 4)):
            raise ValueError(
                f"a cache with a window of exact positions works with {' and '.join(MASKED)} attention, got "
                f"{implementation}: load the model with attn_implementation='sdpa'"
            )
        return mask is None

    def _masks(self, mask: Any, counted: Tensor, length: int, held: int, dtype: torch.dtype) -> Tensor:
        """Make the mask of rebuilt keys followed by the exact ones: (batch or 1, 1, new tokens, length + held).

        Parameters
        ----------
        mask
            Of the tokens as a stock attention would take it; None for a causal one.
        counted
            Where the new tokens lie in the cache.
        length, held
            Numbers of the rebuilt keys and of the exact ones, which are those of the last tokens.
        dtype
            Of a mask that is added.
        """
        places = torch.arange(length, device=counted.device)
        first = counted[-1] + 1 - held
        if self._is_absent(mask):
            mask = (places <= counted[:, None])[None, None]
        near = (counted[:, None] - places < self.lr_remembered.window) & (places >= first)
        exact = first + torch.arange(held, device=counted.device)
        if mask.dtype != torch.bool or self.config._attn_implementation == "eager":
            least = torch.finfo(dtype).min
            if mask.dtype == torch.bool:
                mask = torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, least)
            older = mask[..., :length].masked_fill(near, least)
            return torch.cat([older, mask[..., exact].masked_fill(~near[:, exact], least)], -1)
        return torch.cat([mask[..., :length] & ~near, mask[..., exact] & near[:, exact]], -1)

    @torch.no_grad()
    def products(self) -> tuple[Tensor, Tensor]:
        """Multiply out the matrices of keys and values, each (kv_heads · width, hidden), in at least float32."""
        factors = [module.get_parameter("weight") for module in (self.lr_rebuild, self.lr_latent)]
        half = factors[0].dtype.itemsize < 4 or factors[0].device.type == "mps"
        left, right = (factor.to(torch.float32 if half else torch.float64) for factor in factors)
        key, value = (left @ right).split(self._widths())
        return key, value

    def stock_products(self) -> dict[str, Tensor]:
        """Return what the projection of each name adds to its weight, (rows, hidden), to emit what is rebuilt."""
        heads, (key, value) = self.lr_heads, self.products()
        if heads.q != heads.k:
            return {heads.k: key, heads.v: value}
        query = key.new_zeros(heads.heads * heads.query_key, key.shape[1])
        if not heads.interleaved:
            return {heads.q: torch.cat([query, key, value])}
        parts = [matrix.unflatten(0, (heads.heads, -1)) for matrix in (query, key, value)]
        return {heads.q: torch.cat(parts, 1).flatten(0, 1)}

    def forget(self) -> None:
        """Take away what is not of the stock attention, but for the class."""
        del self.lr_latent, self.lr_rebuild
        for name in ("lr_remembered", "lr_turning"):
            self.__dict__.pop(name)

    def extra_repr(self) -> str:
        """Widths and what is cached, as ``print(model)`` shows them."""
        return f"{super().extra_repr()}, latent={self.lr_remembered.rank}, window={self.lr_remembered.window}"

    def __reduce_ex__(self, protocol: Any) -> Any:
        _, _, *state = nn.Module.__reduce_ex__(self, protocol)
        return (_blank_latent, (self.lr_stock_class,), *state)


def _filled(latent: Tensor, cache: Any, layer: int) -> Tensor:
    """Repeat the first numbers of latents (…, rank) behind their last, where a cache quantizes them in groups."""
    layers = getattr(cache, "layers", ())
    group = getattr(layers[layer], "q_group_size", 1) if layer < len(layers) else 1
    rank = latent.shape[-1]
    if group == 1:
        return latent
    return latent[..., torch.arange(rank + -rank % (2 * group), device=latent.device) % rank]


def turned(states: Tensor, tables: tuple[Tensor, ...] | None) -> Tensor:
    """Rotate the leading dimensions of (batch, heads, tokens, size) by tables (batch, tokens, rotary), if any."""
    if tables is None:
        return states
    cos, sin = (table[..., : table.shape[-1] // 2].unsqueeze(1) for table in tables)
    rotary = 2 * cos.shape[-1]
    one, two = states[..., :rotary].chunk(2, -1)
    return torch.cat([one * cos - two * sin, two * cos + one * sin, states[..., rotary:]], -1)


@functools.cache
def latent_class(stock: type[nn.Module]) -> type[LatentAttention]:
    """Make the subclass of a family's attention class that caches latents."""
    return type(f"Latent{stock.__name__}", (LatentAttention, stock), {"lr_stock_class": stock})


def _blank_latent(stock: type[nn.Module]) -> LatentAttention:
    """Make an attention without any attribute, for ``pickle`` and ``copy`` to fill."""
    made = latent_class(stock)
    return made.__new__(made)
