"""What is given one rank: a matrix, or the matrices of a module that shrink together.

Calibration, allocation and reports know units only by this interface; which method is behind one shows in how it is
encoded alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from lowrank_compress.allocation.storage import STORAGES, cost, largest_rank
from lowrank_compress.arch.resolve import Target
from lowrank_compress.arch.spec import Role
from lowrank_compress.calibration.statistics import STATISTICS, statistic_key
from lowrank_compress.linalg.weighted import Projector
from lowrank_compress.methods.linear import Damping, LinearMethod, decompose_target, sensitivities
from lowrank_compress.methods.module import ModuleMethod

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

    def statistics(self) -> Mapping[str, frozenset[str]]:
        """Target name -> names of the statistics that its basis is made of."""
        ...

    def stored(self, format: str, ranks: np.ndarray) -> np.ndarray:
        """Stored elements at int64 ranks."""
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
        """Squared loss at rank 0, 1, …, as far as the basis was kept; (… + 1,) float64."""
        ...


def dense_elements(unit: Unit) -> int:
    """Elements of all its dense matrices."""
    return sum(target.elements for target in unit.targets)


def full_rank(unit: Unit) -> int:
    """The rank that nothing is gained by."""
    return min(unit.shape)


def stored_elements(unit: Unit, format: str, rank: int | None) -> int:
    """Stored elements in a format at one rank; None for dense."""
    return dense_elements(unit) if rank is None else int(unit.stored(format, np.array([rank], dtype=np.int64))[0])


@dataclass(frozen=True)
class MatrixUnit:
    """One matrix, compressed by a linear method."""

    target: Target
    method: LinearMethod
    formats: tuple[str, ...] = STORAGES
    step: int = 1

    @property
    def name(self) -> str:
        """The target's."""
        return self.target.name

    @property
    def block(self) -> int:
        """The target's."""
        return self.target.block

    @property
    def targets(self) -> tuple[Target, ...]:
        """The one target."""
        return (self.target,)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.target.shape

    @property
    def identity(self) -> tuple[str, ...]:
        """Its metrics."""
        return (self.method.left.name, self.method.right.name)

    @property
    def nats(self) -> bool:
        """Whether the method's unit is nats."""
        return self.method.unit == "nats"

    @property
    def loses_mean(self) -> bool:
        """Whether the method would restore the mean here, but has no bias to do it with."""
        return self.method.right.centred and not self.target.has_bias

    def statistics(self) -> Mapping[str, frozenset[str]]:
        """What the method needs for a matrix of this shape."""
        return {self.target.name: self.method.statistics(self.target)}

    def stored(self, format: str, ranks: np.ndarray) -> np.ndarray:
        """Stored elements, `storage.cost`."""
        return cost(format, self.shape, ranks)

    def largest(self, storage: str) -> int:
        """The largest rank that stores less than dense, and is below the matrix's own."""
        return min(largest_rank(storage, self.shape, self.target.elements - 1), min(self.shape) - 1)

    def decompose(
        self, weights: Weights, means: Mapping[str, Tensor], damping: Damping, keep: int
    ) -> dict[str, Tensor]:
        """Decompose in the method's metric.

        ``values`` (r,), ``total``, ``expand`` (k, keep), ``contract`` (keep, k) where it is not the transpose,
        ``out_sensitivity`` (out,), ``in_sensitivity`` (in,), and ``mean`` (in,) where the method restores it.
        """
        target, method = self.target, self.method
        projector = decompose_target(method, target, weights(target), means, damping, max(keep, 1))
        rows, columns = sensitivities(method, target, means, damping)
        tensors = {
            "values": projector.values,
            "total": torch.tensor(projector.total, dtype=torch.float64),
            "expand": projector.expand[:, :keep].float(),
            "out_sensitivity": rows.clone(),
            "in_sensitivity": columns.clone(),
        }
        # Without a near metric the two are transposes of each other: keep one.
        if method.sides(target)[0].near:
            tensors["contract"] = projector.contract[:keep].float()
        if method.restores_mean(target):
            tensors["mean"] = means[statistic_key(target, "in_mean")].clone()
        return {f"{self.name}/{name}": tensor for name, tensor in tensors.items()}

    def basis_elements(self, keep: int) -> int:
        """One or two factors of a projector."""
        return keep * min(self.shape) * (2 if self.method.sides(self.target)[0].near else 1)

    def working_bytes(self) -> int:
        """Seven squares of the smaller side; and the weight twice, where no statistic stands for the larger side."""
        _, far = self.method.sides(self.target)
        weight = 0 if far.far and not far.diagonal else 2 * self.target.elements
        return torch.float64.itemsize * (7 * min(self.shape) ** 2 + weight)

    def tail(self, basis: Mapping[str, Tensor]) -> Tensor:
        """Squared metric loss of the matrix."""
        expand = basis[f"{self.name}/expand"]  # only its size counts here
        total = float(basis[f"{self.name}/total"])
        return Projector(basis[f"{self.name}/values"], total, expand, expand.T).tail()

    def projector(self, basis: Mapping[str, Tensor], dtype: torch.dtype = torch.float64) -> Projector:
        """Read the projector from a basis, its matrices in a dtype to multiply in."""
        expand = basis[f"{self.name}/expand"].to(dtype)
        contract = basis.get(f"{self.name}/contract")
        return Projector(
            basis[f"{self.name}/values"],
            float(basis[f"{self.name}/total"]),
            expand,
            expand.T if contract is None else contract.to(dtype),
        )


@dataclass(frozen=True)
class ModuleUnit:
    """The matrices of a module that shrink together; the rank is the width that is kept.

    For queries and keys, and for values and their outputs, that is the width of one head.
    """

    name: str
    targets: tuple[Target, ...]
    method: ModuleMethod
    formats: tuple[str, ...] = ("width",)

    @property
    def block(self) -> int:
        """The targets'."""
        return self.targets[0].block

    @property
    def roles(self) -> dict[Role, Target]:
        """The targets by what they compute."""
        return {target.role: target for target in self.targets}

    @property
    def shape(self) -> tuple[int]:
        """The full width: of a head, or of the MLP."""
        heads = self.targets[0].heads
        return (self.roles["down"].shape[1] if heads is None else heads.size,)

    @property
    def identity(self) -> tuple[str, ...]:
        """The factorizer and its metric."""
        return (self.method.name, "kfac" if self.method.fisher else "gram")

    @property
    def step(self) -> int:
        """2 for queries and keys that are rotated: pairs stay together."""
        return 2 if self._rotated else 1

    @property
    def nats(self) -> bool:
        """Whether it is weighted by the Fisher information."""
        return self.method.fisher

    @property
    def _rotated(self) -> bool:
        heads = self.targets[0].heads
        return self.method.group == "qk" and heads is not None and heads.rotary > 0

    def statistics(self) -> Mapping[str, frozenset[str]]:
        """What the method needs of each role."""
        wanted = self.method.statistics(self.method.fisher)
        return {target.name: wanted.get(target.role, frozenset()) for target in self.targets}

    def stored(self, format: str, ranks: np.ndarray) -> np.ndarray:
        """Elements of the smaller matrices, and of the list of the dimensions that rotated heads keep."""
        (width,) = self.shape
        index = self.targets[0].heads.key if self._rotated and self.targets[0].heads else 0
        return ranks * (dense_elements(self) // width + index)

    def largest(self, storage: str) -> int:
        """The largest multiple of the step that stores less than dense."""
        ranks = np.arange(self.step, self.shape[0], self.step, dtype=np.int64)
        return int(ranks[self.stored("width", ranks) < dense_elements(self)].max(initial=0))

    def decompose(
        self, weights: Weights, means: Mapping[str, Tensor], damping: Damping, keep: int
    ) -> dict[str, Tensor]:
        """Make the method's basis, which serves every width."""
        matrices: dict[Role, Tensor] = {target.role: weights(target) for target in self.targets}
        device = next(iter(matrices.values())).device
        moments = {
            f"{target.role}/{statistic}": means[statistic_key(target, statistic)].to(device, torch.float64)
            for target in self.targets
            for statistic in self.statistics()[target.name]
        }
        basis = self.method.decompose(self.targets[0].heads, matrices, moments, damping, self.method.fisher)
        # Matrices in single precision, as the bases of linear methods; losses are vectors.
        return {
            f"{self.name}/{name}": tensor.float() if tensor.dtype == torch.float64 and tensor.ndim > 1 else tensor
            for name, tensor in basis.items()
        }

    def basis_elements(self, keep: int) -> int:
        """A square of the width for each of the heads, or for the MLP."""
        heads = self.targets[0].heads
        return self.shape[0] ** 2 * (1 if heads is None else 2 * heads.key)

    def working_bytes(self) -> int:
        """Four squares of the width."""
        return torch.float64.itemsize * 4 * self.shape[0] ** 2

    def tail(self, basis: Mapping[str, Tensor]) -> Tensor:
        """Squared loss of the module's output."""
        return basis[f"{self.name}/tail"].double().cpu()


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


def candidate_ranks(unit: Unit, storage: str, multiple: int) -> np.ndarray:
    """Ranks that may be chosen, rising int64: multiples of `multiple` (and of the unit's step) that store less."""
    step = math.lcm(unit.step, multiple)
    return np.arange(step, unit.largest(storage) + 1, step, dtype=np.int64)
