"""The moments of the two halves of a calibration set, of which one serves to score what was fitted on the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from lowrank_compress.calibration.statistics import HALVES, STATISTICS, first_half


@dataclass(frozen=True)
class Halves:
    """Means over each half, by the keys that the means over all of it have; what was not halved is that of all."""

    first: Mapping[str, Tensor]
    second: Mapping[str, Tensor]


class _Half(Mapping[str, Tensor]):
    """One half's means, the second one's computed when they are looked up."""

    def __init__(self, means: Mapping[str, Tensor], *, second: bool) -> None:
        self._means, self._second = means, second

    def __getitem__(self, key: str) -> Tensor:
        whole, first = self._means[key], self._means.get(first_half(key))
        if first is None or not self._second:
            return whole if first is None else first
        of_tokens, of_losses = self._means[HALVES].tolist()
        share = of_losses if STATISTICS[key.rsplit("/", 1)[-1]].gradient else of_tokens
        return (whole - share * first) / (1 - share)

    def __iter__(self) -> Iterator[str]:
        return iter(self._means)

    def __len__(self) -> int:
        return len(self._means)


def halves_of(means: Mapping[str, Tensor], keys: Mapping[str, int]) -> Halves | None:
    """Return the halves of a block's means, None where none of `keys` was taken by halves."""
    if not any(first_half(key) in means for key in keys):
        return None
    return Halves(_Half(means, second=False), _Half(means, second=True))
