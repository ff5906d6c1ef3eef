"""Which heads of a model talk to which, block by block: pairs of heads, and channels of single directions."""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lowrank_compress.arch.targets import Target
from lowrank_compress.linalg.channels import Directions, composition_scores, cosines, product_directions


class Talk:
    """Hears the attention of each block in turn, and keeps what is said loudest.

    What a head writes are the left singular directions of W_O W_V. What it reads are the directions of W_Qᵀ W_K, by
    queries on the left and by keys on the right, and the right ones of W_O W_V, by values. Norms between the blocks,
    and rotations of queries and keys by position, are left aside.

    Parameters
    ----------
    most
        Pairs of heads, and channels, to keep.
    components
        Leading directions of each head that channels are looked for among.
    """

    def __init__(self, most: int, components: int) -> None:
        self._most, self._components = most, components
        self._written: list[tuple[int, Directions]] = []
        self._pairs: list[tuple[float, tuple[int, ...], str]] = []
        self._channels: list[tuple[float, tuple[int, ...], str]] = []
        self._width = 0

    @property
    def heard(self) -> bool:
        """Whether there was attention that could be heard."""
        return bool(self._width)

    def hear(self, block: int, matrices: Mapping[str, tuple[Target, Tensor]]) -> None:
        """Take the matrices of a block, (out, in) by role; a block that has not all four is passed over."""
        if not {"q", "k", "v", "o"} <= set(matrices):
            return
        heads = matrices["q"][0].heads
        if heads is None or not heads.size:
            return
        shared = heads.query // heads.key
        query, key, value, output = (matrices[role][1].cpu() for role in "qkvo")
        self._width = query.shape[1]
        size = len(query) // heads.query
        queries = query.reshape(heads.query, size, -1)
        keys = key.reshape(heads.key, size, -1).repeat_interleave(shared, 0)
        wide = len(value) // heads.key
        values = value.reshape(heads.key, wide, -1).repeat_interleave(shared, 0)
        outputs = output.reshape(len(output), heads.query, wide).transpose(0, 1)
        written, by_value = product_directions(outputs, values)
        by_query, by_key = product_directions(queries.mT, keys)
        for earlier, said in self._written:
            for reads, read in (("q", by_query), ("k", by_key), ("v", by_value)):
                self._compare(earlier, block, said, read, reads)
        self._written.append((block, written))

    def _compare(self, earlier: int, block: int, said: Directions, read: Directions, reads: str) -> None:
        between = cosines(said, read)
        scores = composition_scores(said, read, between)
        _keep(self._pairs, self._most, scores, (earlier, block), reads)
        # Where a map has a lower rank than its factors, what is left of its directions is arbitrary.
        there = _present(said)[:, None, :, None] & _present(read)[None, :, None, :]
        ways = torch.where(there, between.abs(), 0.0)[..., : self._components, : self._components]
        _keep(self._channels, self._most, ways, (earlier, block), reads)

    def found(self) -> dict[str, Any]:
        """Return the loudest pairs of heads and channels, and what unrelated maps would have."""
        pairs = [{**_ends(place, reads), "score": score} for score, place, reads in sorted(self._pairs, key=_loudest)]
        channels = [
            {**_ends(place, reads), "cosine": score} for score, place, reads in sorted(self._channels, key=_loudest)
        ]
        return {"unrelated": self._width**-0.5, "pairs": pairs, "channels": channels}


def _present(directions: Directions) -> Tensor:
    """Which directions a map really has, (heads, r) bool."""
    return directions.values > 1e-5 * directions.values[:, :1]


def _loudest(entry: tuple[float, tuple[int, ...], str]) -> tuple[float, tuple[int, ...], str]:
    return -entry[0], entry[1], entry[2]


def _keep(
    kept: list[tuple[float, tuple[int, ...], str]], most: int, values: Tensor, blocks: tuple[int, int], reads: str
) -> None:
    """Keep the largest of some values, and of those that were kept before, with their places."""
    flat = values.flatten()
    top = flat.topk(min(most, flat.numel()))
    for value, index in zip(top.values.tolist(), top.indices.tolist(), strict=True):
        place = []
        for size in reversed(values.shape):
            index, rest = divmod(index, size)
            place.append(rest)
        heapq.heappush(kept, (value, (*blocks, *reversed(place)), reads))
        if len(kept) > most:
            heapq.heappop(kept)


def _ends(place: tuple[int, ...], reads: str) -> dict[str, Any]:
    """Name the two ends: block, head, and for a channel the number of the direction."""
    earlier, block, writing, reading, *directions = place
    ends: tuple[dict[str, Any], dict[str, Any]] = (
        {"block": earlier, "head": writing},
        {"block": block, "head": reading, "reads": reads},
    )
    for end, direction in zip(ends, directions, strict=False):
        end["direction"] = direction
    return {"from": ends[0], "to": ends[1]}
