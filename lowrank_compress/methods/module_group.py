"""The matrices of a module as a group: they shrink together, and the rank is the width that is kept."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lowrank_compress.allocation.choice import Choice, Choices, of_ranks
from lowrank_compress.arch.spec import QUERY_KEY, Role
from lowrank_compress.arch.targets import Target
from lowrank_compress.calibration.statistics import statistic_key
from lowrank_compress.formats.dense import dense
from lowrank_compress.methods.edit import Edit, Narrower, Replacement, Source
from lowrank_compress.methods.groups import InPlace, Price, Weights, dense_elements, uses
from lowrank_compress.methods.halves import halves_of
from lowrank_compress.methods.linear import Damping
from lowrank_compress.methods.module import ModuleMethod, Reduced
from lowrank_compress.model.casting import cast


@dataclass(frozen=True)
class ModuleGroup(InPlace):
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
    def nats(self) -> bool:
        """Whether it is weighted by the Fisher information."""
        return self.method.fisher

    @property
    def parallel(self) -> bool:
        """It is not: the squares of an MLP are large, and several at a time would want much memory."""
        return False

    @property
    def loses_mean(self) -> bool:
        """Module methods restore no mean."""
        return False

    @property
    def _rotated(self) -> bool:
        heads = self.targets[0].heads
        return self.method.group == QUERY_KEY and heads is not None and heads.rotary > 0

    def statistics(self) -> Mapping[str, frozenset[str]]:
        """What the method needs of each role."""
        wanted = self.method.statistics(self.method.fisher)
        return {target.name: wanted.get(target.role, frozenset()) for target in self.targets}

    def choices(self, format: str, multiple: int = 1) -> Choices:
        """All widths that store less; of a routed expert 0 too, of queries and keys that are rotated only even ones."""
        (width,) = self.shape
        step = math.lcm(2 if self._rotated else 1, multiple)
        # A routed expert may vanish: there are others, and the residual stream goes on without it.
        widths = np.arange(step if self.targets[0].expert is None else 0, width, step, dtype=np.int64)
        stored = widths * self._elements
        paying = stored < dense_elements(self)
        return of_ranks("width", widths[paying], stored[paying], widths[paying] * self._indices)

    def parameters(self, format: str) -> tuple[str, ...]:
        """The width, which is spelled as ranks are."""
        return ("rank",)

    def price(self, choice: Choice) -> Price:
        """Elements of the smaller matrices, and of the list of the dimensions that rotated heads keep."""
        (width,) = choice.parameters
        return Price(width * self._elements, width * self._indices)

    def keep(self, choice: Choice) -> int:
        """The width; every basis serves all of them."""
        return choice.parameters[0]

    def kept(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """Every basis serves all widths."""

    @property
    def _elements(self) -> int:
        """Stored for each dimension or hidden unit that is kept."""
        return dense_elements(self) // self.shape[0] + self._indices

    @property
    def _indices(self) -> int:
        """Of them, indices: one for each rotated head."""
        heads = self.targets[0].heads
        return heads.key if self._rotated and heads is not None else 0

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
        """Two squares of the width for each of the heads; half of one for the MLP."""
        heads = self.targets[0].heads
        return self.shape[0] ** 2 // 2 if heads is None else self.shape[0] ** 2 * 2 * heads.key

    def working_bytes(self) -> int:
        """Four squares of the width."""
        return torch.float64.itemsize * 4 * self.shape[0] ** 2

    def tail(self, basis: Mapping[str, Tensor], *, on_sample: bool = False) -> Tensor:
        """Squared loss of the module's output at width 0, 1, …: (full width + 1,) float64."""
        held_out = basis.get(f"{self.name}/held_out")
        found = basis[f"{self.name}/tail"] if held_out is None or on_sample else held_out
        return found.double().cpu()

    def losses(self, basis: Mapping[str, Tensor], choices: Choices, *, on_sample: bool = False) -> np.ndarray:
        """Those at the widths."""
        return self.tail(basis, on_sample=on_sample).numpy()[choices.parameters[:, 0]]

    def total(self, basis: Mapping[str, Tensor], *, on_sample: bool = False) -> float:
        """That at width 0."""
        return float(self.tail(basis, on_sample=on_sample)[0])

    def encode(self, source: Source, choice: Choice, basis: Mapping[str, Tensor]) -> Edit:
        """Make the module narrower: its matrices are stored dense, with fewer rows or columns."""
        (width,) = choice.parameters
        reduced = self._reduced(source, choice, basis)[2]
        roles = self.roles
        parts = {
            roles[role].name: dense(cast(weight.cpu(), source.dtype, f"The smaller {roles[role].name}"))
            for role, weight in reduced.weights.items()
        }
        biases = {roles[role].name: bias.cpu() for role, bias in reduced.biases.items()}
        index = None if reduced.index is None else reduced.index.cpu()
        heads = None if self.targets[0].heads is None else Narrower(self.method.group.name, width, index)
        return Edit(choice, parts, biases, heads)

    def replace(self, source: Source, choice: Choice, basis: Mapping[str, Tensor]) -> list[Replacement]:
        """Fill the narrower module up with zeros where the dense one has more, which computes the same."""
        weights, biases, reduced = self._reduced(source, choice, basis)
        found = []
        for role, target in self.roles.items():
            reads = role in ("o", "down")  # its columns are what becomes fewer
            places = self._places(role, choice.parameters[0], reduced.index)
            full = torch.zeros_like(weights[role])
            (full.mT if reads else full)[places] = reduced.weights[role].mT if reads else reduced.weights[role]
            bias = reduced.biases.get(role)
            if bias is not None and not reads:
                bias = torch.zeros_like(biases[role]).index_copy_(0, places, bias)
            found.append(Replacement(target, full, bias))
        return found

    def _reduced(
        self, source: Source, choice: Choice, basis: Mapping[str, Tensor]
    ) -> tuple[dict[Role, Tensor], dict[Role, Tensor], Reduced]:
        """Read weights and biases in float64, and reduce them."""
        device = source.device
        weights: dict[Role, Tensor] = {
            role: source.weight(target).to(device).double() for role, target in self.roles.items()
        }
        biases: dict[Role, Tensor] = {
            role: source.bias(target).to(device).double()
            for role, target in self.roles.items()
            if target.bias is not None
        }
        stem = f"{self.name}/"
        own = {name.removeprefix(stem): tensor.to(device) for name, tensor in basis.items() if name.startswith(stem)}
        return weights, biases, self.method.reduce(self.targets[0].heads, weights, biases, own, choice.parameters[0])

    def _places(self, role: Role, width: int, index: Tensor | None) -> Tensor:
        """Where the rows (or columns) of the narrower module stand in the dense one."""
        heads = self.targets[0].heads
        if heads is None:
            return torch.arange(width)
        count = heads.query if role in ("q", "o") else heads.key
        kept = torch.arange(width).expand(count, -1)
        if index is not None:
            kept = index.cpu().repeat_interleave(count // heads.key, dim=0)
        return (kept + torch.arange(count)[:, None] * heads.size).flatten()
