"""Run a model block by block over batches: record once what each block is called with, then replay.

Every block's `forward` is stubbed while the real model runs once a batch. The stubs keep the exact arguments that the
model passes (masks and rotary tables differ by layer type in some families), so that a block can later be called by
itself, with the same result, when it is the only one in memory. The part after the blocks (final norm, head,
soft-cap, pooling) is run the same way: the real model, every block stubbed to hand back the given hidden states.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_compress.errors import UnsupportedError
from lowrank_compress.model.skeleton import Skeleton
from lowrank_compress.model.walk.batch import Batch, pair_rows
from lowrank_compress.model.walk.states import State

# What has logits of some positions without those of the others.
CHUNKED = ("lm", "masked")


@dataclass(frozen=True)
class _Call:
    """The arguments of one block call besides the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Replay:
    """Replays a skeleton's blocks over batches.

    Parameters
    ----------
    skeleton
        The model.
    batches
        The data; on any device.
    """

    def __init__(self, skeleton: Skeleton, batches: Sequence[Batch]) -> None:
        self.skeleton = skeleton
        self.batches = batches
        self._calls: list[list[_Call]] = []
        # Without padding the arguments depend on the shape alone, and masks are large: keep one set a shape.
        self._by_shape: dict[tuple[int, ...], list[_Call]] = {}

    def embed(self, batch: Batch) -> Tensor:
        """Run what lies before the blocks: the first block's input (sequences, length, width); records all calls.

        The head is not run: its logits for a large vocabulary would be the largest tensor of all.
        """
        first: list[Tensor] = []
        calls: list[_Call] = []

        def stub(hidden: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
            if hidden is None:
                hidden = kwargs.pop("hidden_states")
            first.append(hidden)  # pyright: ignore[reportArgumentType]
            if hidden is not first[0] and not torch.equal(first[-1], first[0]):
                raise UnsupportedError(
                    f"{type(self.skeleton.model).__name__} changes the hidden states on the way from block "
                    f"{len(calls) - 1} to block {len(calls)}; expected that what leaves a block enters the next one. "
                    f"This variant of {self.skeleton.resolved.architecture.name!r} is not supported."
                )
            calls.append(_Call(args, kwargs))
            return self._returned(hidden)

        with torch.no_grad(), self._stubbed(stub):
            self._run(self.skeleton.model.base_model, batch)
        known = self._by_shape.get(tuple(batch.ids.shape)) if batch.mask is None else None
        self._calls.append(known or calls)
        if batch.mask is None:
            self._by_shape[tuple(batch.ids.shape)] = self._calls[-1]
        return first[0]

    def start(self) -> Iterator[Tensor]:
        """Embed every batch and record every call: the hidden states that enter block 0, batch by batch.

        What lies outside the blocks is in memory only meanwhile, and again once `head` is called.
        """
        self._calls.clear()
        self.skeleton.load_outside()
        yield from map(self.embed, self.batches)
        self.skeleton.drop_outside()

    def step(self, index: int, block: nn.Module, number: int, hidden: Tensor) -> Tensor:
        """Run block `index` on the hidden states (sequences, length, width) of batch `number`."""
        call = self._calls[number][index]
        out = block(hidden, *call.args, **call.kwargs)
        if self._values and isinstance(out, tuple) and len(out) == self._values:
            out = out[0]
        if not isinstance(out, Tensor):
            raise UnsupportedError(
                f"Block {index} of {type(self.skeleton.model).__name__} returns a {type(out).__name__}; expected the "
                "hidden states alone, as transformers 5 does. Upgrade transformers."
            )
        return out

    def load(self, state: State) -> Tensor:
        """Fetch kept states to the computing device."""
        return state.load().to(self.skeleton.device)

    def head(self, batch: Batch, hidden: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Logits from the hidden states that leave the last block.

        Parameters
        ----------
        batch
            The batch they belong to.
        hidden
            (sequences, length, width).
        start, stop
            Positions wanted (language models only, masked ones too): their logits (sequences, stop − start,
            vocabulary). Others need the whole batch: a classifier's logits (examples, classes), or (examples, length,
            classes) of tokens; those of an answer's first and last token (examples, 2, length); the scores of pairs
            (pairs, 2). Without a head they are the last hidden states.
        """
        self.skeleton.load_outside()
        part = slice(start, stop)
        given = hidden[:, part].to(self.skeleton.device)

        def stub(*_: Any, **__: Any) -> Any:
            return self._returned(given)

        with self._stubbed(stub):
            if self.skeleton.task == "embedding":
                return self._run(self.skeleton.model, batch).last_hidden_state
            if self.skeleton.task == "answers":
                found = self._run(self.skeleton.model, batch)
                return torch.stack([found.start_logits, found.end_logits], 1)
            if self.skeleton.task not in CHUNKED:
                found = self._run(self.skeleton.model, batch).logits
                return found[pair_rows(len(found) // 2), 0] if batch.paired else found
            return self._run(self.skeleton.model, Batch(batch.ids[:, part])).logits

    @property
    def _values(self) -> int:
        """How many values a block of the family returns; 0 for the hidden states alone, as newer transformers say."""
        says = inspect.signature(type(self.skeleton.blocks[0]).forward).return_annotation
        return 0 if says in (Tensor, "torch.Tensor") else self.skeleton.resolved.architecture.values

    def _returned(self, hidden: Tensor | None) -> Any:
        """What a block returns whose hidden states are these."""
        return (hidden, *[None] * (self._values - 1)) if self._values else hidden

    def _run(self, model: nn.Module, batch: Batch) -> Any:
        device = self.skeleton.device
        kinds = batch.kinds if getattr(model.config, "type_vocab_size", 0) > 1 else None
        more = {"attention_mask": batch.mask, "token_type_ids": kinds}
        given = {name: part.to(device) for name, part in more.items() if part is not None}
        return model(input_ids=batch.ids.to(device), **given)

    @contextmanager
    def _stubbed(self, forward: Callable[..., Any]) -> Iterator[None]:
        blocks = self.skeleton.blocks
        for block in blocks:
            block.forward = forward
        try:
            yield
        finally:
            for block in blocks:
                del block.forward
