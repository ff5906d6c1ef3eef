"""The matrices of a module as a unit: they shrink together, and the rank is the width that is kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lowrank_compress.arch.resolve import Target
from lowrank_compress.arch.spec import Role
from lowrank_compress.calibration.statistics import statistic_key
from lowrank_compress.methods.halves import halves_of
from lowrank_compress.methods.linear import Damping
from lowrank_compress.methods.module import ModuleMethod
from lowrank_compress.methods.units import Weights, dense_elements, uses


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
    def parallel(self) -> bool:
        """It is not: the squares of an MLP are large, and several at a time would want much memory."""
        return False

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
        return ranks * (dense_elements(self) // width + self.indices("width", 1))

    def indices(self, format: str, rank: int) -> int:
        """The dimensions that each rotated head keeps."""
        heads = self.targets[0].heads
        return rank * heads.key if self._rotated and heads is not None else 0

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
        halves = halves_of(means, uses(self))
        if halves is not None:
            moments |= {
                f"{target.role}/{statistic}@{name}": half[statistic_key(target, statistic)].to(device, torch.float64)
                for target in self.targets
                for statistic in self.statistics()[target.name]
                for name, half in (("first", halves.first), ("second", halves.second))
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
