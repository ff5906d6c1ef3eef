"""What is given one rank: a matrix, or the matrices of a module that shrink together.

Calibration, allocation and reports know units only by this interface; which method is behind one shows in how it is
encoded alone. `matrix_unit` and `module_unit` hold the two kinds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from lowrank_compress.arch.resolve import Target
from lowrank_compress.calibration.statistics import STATISTICS, statistic_key
from lowrank_compress.methods.linear import Damping
from lowrank_compress.model.layers import INDEX_DTYPE

Weights = Callable[[Target], Tensor]


class Unit(Protocol):
    """One rank's worth of a block."""

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
        """The matrices that the rank is for."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in) of a matrix, (width,) of a module."""
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
    def step(self) -> int:
        """Ranks are multiples of it."""
        ...

    @property
    def nats(self) -> bool:
        """Half its squared loss estimates the loss increase in nats per token."""
        ...

    @property
    def parallel(self) -> bool:
        """Whether it is decomposed beside others, in one thread; what is not is given all threads."""
        ...

    def statistics(self) -> Mapping[str, frozenset[str]]:
        """Target name -> names of the statistics that its basis is made of."""
        ...

    def stored(self, format: str, ranks: np.ndarray) -> np.ndarray:
        """Stored elements at int64 ranks."""
        ...

    def indices(self, format: str, rank: int) -> int:
        """How many of the stored elements are indices; for "auto" the most that they may be."""
        ...

    def largest(self, storage: str) -> int:
        """The largest rank that stores less than dense."""
        ...

    def decompose(
        self, weights: Weights, means: Mapping[str, Tensor], damping: Damping, keep: int
    ) -> dict[str, Tensor]:
        """Make its basis for ranks up to `keep`: tensors whose names begin with the unit's."""
        ...

    def basis_elements(self, keep: int) -> int:
        """About how many elements its basis has."""
        ...

    def working_bytes(self) -> int:
        """About how much memory `decompose` takes beside the statistics."""
        ...

    def tail(self, basis: Mapping[str, Tensor]) -> Tensor:
        """Squared loss at rank 0, 1, …, as far as the basis was kept, on the calibration set; (… + 1,) float64."""
        ...


def held_out(unit: Unit, basis: Mapping[str, Tensor]) -> Tensor:
    """As `Unit.tail`, on text that the fit was not made on where the basis tells that."""
    found = basis.get(f"{unit.name}/held_out")
    return unit.tail(basis) if found is None else found.double().cpu()


def dense_elements(unit: Unit) -> int:
    """Elements of all its dense matrices."""
    return sum(target.elements for target in unit.targets)


def full_rank(unit: Unit) -> int:
    """The rank that nothing is gained by."""
    return min(unit.shape)


def stored_elements(unit: Unit, format: str, rank: int | None) -> int:
    """Stored elements in a format at one rank; None for dense."""
    return dense_elements(unit) if rank is None else int(unit.stored(format, np.array([rank], dtype=np.int64))[0])


def stored_bytes(unit: Unit, format: str, rank: int | None, itemsize: int) -> int:
    """Bytes of what is stored in a format at one rank, None for dense, at so many bytes a weight."""
    indices = 0 if rank is None else unit.indices(format, rank)
    return (stored_elements(unit, format, rank) - indices) * itemsize + indices * INDEX_DTYPE.itemsize


def needed(units: Sequence[Unit]) -> dict[str, frozenset[str]]:
    """Target name -> names of the statistics it needs."""
    wanted: dict[str, frozenset[str]] = {}
    for unit in units:
        for name, statistics in unit.statistics().items():
            wanted[name] = wanted.get(name, frozenset()) | statistics
    return wanted


def uses(unit: Unit) -> dict[str, int]:
    """Statistics that a unit's basis is made of: key among those of its block -> elements."""
    wanted = unit.statistics()
    return {
        statistic_key(target, name): STATISTICS[name].elements(target)
        for target in unit.targets
        for name in wanted[target.name]
    }


def statistics_bytes(units: Iterable[Unit]) -> int:
    """Bytes of the float64 statistics that units of one block need, those that they share counted once."""
    sizes = {key: elements for unit in units for key, elements in uses(unit).items()}
    return torch.float64.itemsize * sum(sizes.values())


def needs_data(units: Sequence[Unit]) -> bool:
    """Whether any statistic is needed."""
    return any(needed(units).values())


def ranking(unit: Unit, storage: str) -> str:
    """The format in which ranks of a unit are counted: the storage asked for, where it has any choice."""
    return storage if storage in unit.formats else unit.formats[0]


def candidate_ranks(unit: Unit, storage: str, multiple: int) -> np.ndarray:
    """Ranks that may be chosen, rising int64: multiples of `multiple` (and of the unit's step) that store less."""
    step = math.lcm(unit.step, multiple)
    return np.arange(step, unit.largest(storage) + 1, step, dtype=np.int64)
