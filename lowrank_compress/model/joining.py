"""Experts' tensors, put together to the stored ones that have those of all experts of a block."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from lowrank_compress.model.names import experts_of


class Joining:
    """Takes tensors of separate experts one by one, and gives those to be stored as soon as all of one is there.

    Parameters
    ----------
    model
        Whose experts these are.
    stored
        Name in the model -> name on disk, which several share that are one tensor there.
    """

    def __init__(self, model: nn.Module, stored: Mapping[str, str]) -> None:
        self._experts, self._stored = experts_of(model), stored
        self._together = Counter(stored.values())
        self._waiting: dict[str, dict[str, Tensor]] = defaultdict(dict)

    def __contains__(self, name: str) -> bool:
        """Whether a tensor, by its name in the model, is one of those."""
        return name in self._stored

    def add(self, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Take a tensor; yield what is complete with it, by its name on disk."""
        stored = self._stored[name]
        if self._together[stored] == 1:
            yield stored, tensor
            return
        self._waiting[stored][name] = tensor
        if len(self._waiting[stored]) == self._together[stored]:
            yield stored, self._joined(name, self._waiting.pop(stored))

    def _joined(self, name: str, own: Mapping[str, Tensor]) -> Tensor:
        path, _, *leaf = name.rsplit(".", 3)
        experts = self._experts[path]
        fusion, source = experts.fusion, experts.fusion.source(".".join(leaf))
        parts = {
            leaf: torch.stack([own[f"{path}.{number}.{leaf}"] for number in range(len(experts))])
            for leaf in fusion.leaves
            if fusion.source(leaf) == source
        }
        return fusion.joined(source, parts)
