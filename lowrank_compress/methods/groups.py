"""What is given one choice: a matrix, the matrices of a module that shrink together, or all experts of a block.

Calibration, allocation, encoding and reports know groups only by this interface.
`matrix_group`, `module_group` and `expert_group` hold the three kinds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from lowrank_compress.allocation.choice import Choice, Choices
from lowrank_compress.arch.targets import Target
from lowrank_compress.calibration.statistics import STATISTICS, statistic_key
from lowrank_compress.methods.edit import Edit, Replacement, Rerouted, Source
from lowrank_compress.methods.linear import Damping
from lowrank_compress.shipped.formats.base import INDEX_DTYPE

Weights = Callable[[Target], Tensor]


@dataclass(frozen=True)
class Price:
    """What is stored: elements, and how many of them are indices, which take other bytes than weights do."""

    elements: int
    indices: int

    def bytes(self, itemsize: int) -> int:
        """Return the bytes, at so many bytes a weight."""
        return (self.elements - self.indices) * itemsize + self.indices * INDEX_DTYPE.itemsize


class InPlace:
    """What groups have in common that store something in the place of their matrices."""

    @property
    def beside(self) -> bool:
        """Nothing lies beside them."""
        return False

    @property
    def cached(self) -> int:
        """Nothing of a cache."""
        return 0


class TargetGroup(Protocol):
    """Matrices that get one choice together."""

    @property
    def name(self) -> str:
        """Key in ranks.json and in files."""
        ...

    @property
    def block(self) -> int:
        """Index of the transformer block."""
        ...

    @property
    def targets(self) -> tuple[Target, ...]:
        """The matrices that the choice is for."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in) of a matrix, (width,) of a module, (how many,) of experts."""
        ...

    @property
    def identity(self) -> tuple[str, ...]:
        """What decides its basis, besides statistics and damping."""
        ...

    @property
    def formats(self) -> tuple[str, ...]:
        """Storage formats that ranks.json may name, besides dense."""
        ...

    @property
    def nats(self) -> bool:
        """Half its squared loss estimates the loss increase in nats per token."""
        ...

    @property
    def parallel(self) -> bool:
        """Whether it is decomposed beside others, in one thread; what is not is given all threads."""
        ...

    @property
    def loses_mean(self) -> bool:
        """Whether its method would restore the mean input, but has no bias to do it with."""
        ...

    @property
    def beside(self) -> bool:
        """Whether what it stores lies beside its matrices, which stay as they are."""
        ...

    @property
    def cached(self) -> int:
        """Numbers that a stock cache keeps of a token, where the choice is for these; else 0."""
        ...

    def statistics(self) -> Mapping[str, frozenset[str]]:
        """Target name -> names of the statistics that its basis is made of."""
        ...

    def choices(self, format: str, multiple: int = 1) -> Choices:
        """What may be chosen in a format that stores less than dense, cheapest first.

        Parameters
        ----------
        multiple
            Ranks are multiples of it, and of what the group itself asks for.
        """
        ...

    def parameters(self, format: str) -> tuple[str, ...]:
        """Names of the parameters of a choice, as ranks.json spells them."""
        ...

    def price(self, choice: Choice) -> Price:
        """What a choice stores."""
        ...

    def keep(self, choice: Choice) -> int:
        """The largest rank that a basis must have for a choice."""
        ...

    def kept(self, shapes: Mapping[str, Sequence[int]]) -> int | None:
        """The largest rank that its basis serves, from the shapes of the tensors; None for every choice."""
        ...

    def decompose(
        self, weights: Weights, means: Mapping[str, Tensor], damping: Damping, keep: int
    ) -> dict[str, Tensor]:
        """Make its basis for ranks up to `keep`: tensors whose names begin with the group's."""
        ...

    def basis_elements(self, keep: int) -> int:
        """About how many elements its basis has."""
        ...

    def working_bytes(self) -> int:
        """About how much memory `decompose` takes beside the statistics."""
        ...

    def losses(self, basis: Mapping[str, Tensor], choices: Choices, *, on_sample: bool = False) -> np.ndarray:
        """Squared loss of the first choices, as many as the basis was kept for: (… ≤ choices,) float64.

        On text that the fit was not made on where the basis tells that, or `on_sample` on the calibration set itself.
        """
        ...

    def total(self, basis: Mapping[str, Tensor], *, on_sample: bool = False) -> float:
        """Squared loss where nothing is kept."""
        ...

    def encode(self, source: Source, choice: Choice, basis: Mapping[str, Tensor]) -> Edit:
        """Put it into the format of a choice.

        Raises
        ------
        InputError
            The basis was not kept for it.
        """
        ...

    def replace(self, source: Source, choice: Choice, basis: Mapping[str, Tensor]) -> Iterable[Replacement | Rerouted]:
        """Return what a choice makes of its matrices, not rounded, in the dense model's own shapes."""
        ...


def replaced(group: TargetGroup) -> tuple[Target, ...]:
    """The matrices in whose place something else is stored: all; none of a group that is stored beside them."""
    return () if group.beside else group.targets


def dense_elements(group: TargetGroup) -> int:
    """Elements of all its dense matrices."""
    return sum(target.elements for target in replaced(group))


def price_of(group: TargetGroup, choice: Choice) -> Price:
    """What a choice stores, dense included."""
    return Price(dense_elements(group), 0) if choice.is_dense else group.price(choice)


def largest_kept(group: TargetGroup, format: str) -> int:
    """The largest rank that a basis must have for any choice in a format that stores less than dense."""
    choices = group.choices(format)
    return group.keep(choices[-1]) if len(choices) else 0


def cheaper(group: TargetGroup, format: str, stored: int, multiple: int = 1) -> Choice | None:
    """Return the largest choice in a format that stores at most so many elements; None if none does."""
    choices = group.choices(format, multiple)
    count = int(np.searchsorted(choices.stored, stored, side="right"))
    return choices[count - 1] if count else None


def needed(groups: Sequence[TargetGroup]) -> dict[str, frozenset[str]]:
    """Target name -> names of the statistics it needs."""
    wanted: dict[str, frozenset[str]] = {}
    for group in groups:
        for name, statistics in group.statistics().items():
            wanted[name] = wanted.get(name, frozenset()) | statistics
    return wanted


def uses(group: TargetGroup) -> dict[str, int]:
    """Statistics that a group's basis is made of: key among those of its block -> elements."""
    wanted = group.statistics()
    return {
        statistic_key(target, name): STATISTICS[name].elements(target)
        for target in group.targets
        for name in wanted[target.name]
    }


def statistics_bytes(groups: Iterable[TargetGroup]) -> int:
    """Bytes of the float64 statistics that groups of one block need, those that they share counted once."""
    sizes = {key: elements for group in groups for key, elements in uses(group).items()}
    return torch.float64.itemsize * sum(sizes.values())


def needs_data(groups: Sequence[TargetGroup]) -> bool:
    """Whether any statistic is needed."""
    return any(needed(groups).values())


def ranking(group: TargetGroup, storage: str) -> str:
    """The format in which ranks of a group are counted: the storage asked for, where it has any choice."""
    return storage if storage in group.formats else group.formats[0]
