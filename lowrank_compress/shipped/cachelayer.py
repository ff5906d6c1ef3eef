"""A layer of a cache that keeps, beside the latents of all tokens, exact keys and values of the last ones."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class WindowedLayer:
    """Mixed into the class of a cache's layer, which keeps the latents as it would keep keys and values.

    What is done to the cache between two calls of the model, such as the reordering of beams, is done to the window
    too. Where tokens are taken back (`crop`), those before them are not exact again: these come from their latents.
    """

    lr_exact: tuple[Tensor, Tensor] | None = None

    def extended(self, keys: Tensor, values: Tensor, window: int) -> tuple[Tensor, Tensor]:
        """Return the exact keys and values (batch, heads, tokens, size) that there are, these new ones last.

        It keeps those of the last `window` − 1 tokens: the next one has its own.
        """
        if self.lr_exact is not None:
            kept = (states.to(keys.device) for states in self.lr_exact)
            keys, values = (torch.cat(pair, -2) for pair in zip(kept, (keys, values), strict=True))
        count = min(window - 1, keys.shape[-2])
        start = keys.shape[-2] - count
        # Copied, so that a long prompt's are let go.
        self.lr_exact = (keys[..., start:, :].clone(), values[..., start:, :].clone())
        return keys, values

    def _each(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.lr_exact is not None:
            keys, values = self.lr_exact
            self.lr_exact = (change(keys), change(values))

    def _stock(self) -> Any:
        """The methods of the class that this one is mixed into."""
        return super()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder along the batch."""
        self._stock().reorder_cache(beam_idx)
        self._each(lambda states: states.index_select(0, beam_idx.to(states.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat along the batch."""
        self._stock().batch_repeat_interleave(repeats)
        self._each(lambda states: states.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these of the batch."""
        self._stock().batch_select_indices(indices)
        self._each(lambda states: states[indices])

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Take tokens back."""
        before = int(self._stock().get_seq_length())
        self._stock().crop(*args, **kwargs)
        removed = before - int(self._stock().get_seq_length())
        self._each(lambda states: states[..., : max(states.shape[-2] - removed, 0), :])

    def reset(self) -> None:
        """Forget everything."""
        self._stock().reset()
        self.lr_exact = None

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Its class has no name that pickle could look up.
        _, _, *state = super().__reduce_ex__(protocol)
        return (_blank_layer, (getattr(type(self), "lr_stock_class"),), *state)  # noqa: B009


@functools.cache
def windowed_class(stock: type) -> type:
    """Make the subclass of a class of cache layers that also keeps a window."""
    # Else the subclass would take its place in the tables that transformers makes caches by.
    own = {"lr_stock_class": stock, "_layer_type": None}
    return type(f"Windowed{stock.__name__}", (WindowedLayer, stock), own)


def _blank_layer(stock: type) -> Any:
    """Make a layer without any attribute, for ``pickle`` and ``copy`` to fill."""
    made: Any = windowed_class(stock)
    return made.__new__(made)


def windowed(cache: Any, layer: int) -> Any:
    """Return a layer of a cache, from now on one that keeps a window."""
    found = cache.layers[layer]
    if not isinstance(found, WindowedLayer):
        made = _blank_layer(type(found))
        made.__dict__.update(found.__dict__)
        cache.layers[layer] = made
    return cache.layers[layer]
