"""One matrix as a unit: it is given a rank of its own, and a linear method finds its factors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lowrank_compress.allocation.storage import STORAGES, cost, largest_rank
from lowrank_compress.arch.resolve import Target
from lowrank_compress.calibration.statistics import statistic_key
from lowrank_compress.linalg.weighted import Projector
from lowrank_compress.methods.halves import halves_of
from lowrank_compress.methods.linear import Damping, LinearMethod, decompose_target, fit_held_out, sensitivities
from lowrank_compress.methods.units import Weights, uses


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
    def parallel(self) -> bool:
        """It is: one thread is hardly slower on one matrix than several."""
        return True

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

    def indices(self, format: str, rank: int) -> int:
        """The pivot rows."""
        return 0 if format == "pair" else rank

    def largest(self, storage: str) -> int:
        """The largest rank that stores less than dense, and is below the matrix's own."""
        return min(largest_rank(storage, self.shape, self.target.elements - 1), min(self.shape) - 1)

    def decompose(
        self, weights: Weights, means: Mapping[str, Tensor], damping: Damping, keep: int
    ) -> dict[str, Tensor]:
        """Decompose in the method's metric; where there are halves, in that which loses least on the other half.

        ``values`` (r,), ``total``, ``expand`` (k, keep), ``contract`` (keep, k) where it is not the transpose,
        ``out_sensitivity`` (out,), ``in_sensitivity`` (in,), ``mean`` (in,) where the method restores it, and
        ``held_out`` (keep + 1,), the squared loss on other text, where there are halves.
        """
        target, method = self.target, self.method
        weight, halves, predicted = weights(target), halves_of(means, uses(self)), None
        if halves is not None and self.nats:
            damping, predicted = fit_held_out(method, target, weight, halves, damping)
        projector = decompose_target(method, target, weight, means, damping, max(keep, 1))
        rows, columns = sensitivities(method, target, means, damping)
        tensors = {
            "values": projector.values,
            "total": torch.tensor(projector.total, dtype=torch.float64),
            "expand": projector.expand[:, :keep].float(),
            "out_sensitivity": rows.clone(),
            "in_sensitivity": columns.clone(),
        }
        if predicted is not None:
            tensors["held_out"] = predicted[: max(keep, 1) + 1]
        # Without a near metric the two are transposes of each other: keep one.
        if method.sides(target)[0].near:
            tensors["contract"] = projector.contract[:keep].float()
        if method.restores_mean(target):
            tensors["mean"] = means[statistic_key(target, "in_mean")].clone()
        return {f"{self.name}/{name}": tensor for name, tensor in tensors.items()}

    def basis_elements(self, keep: int) -> int:
        """One or two factors of a projector."""
        return keep * min(self.shape) * (2 if self.method.sides(self.target)[0].near else 1)

    def kept(self, shapes: Mapping[str, Sequence[int]]) -> int:
        """The largest rank that its basis serves, from the shapes of its tensors."""
        return shapes[f"{self.name}/expand"][1]

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
