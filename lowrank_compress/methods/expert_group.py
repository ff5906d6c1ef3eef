"""All experts of a block as a group: the choice is how many of them, or of all their hidden units, are kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import torch
from torch import Tensor

from lowrank_compress.allocation.choice import Choice, Choices, of_ranks
from lowrank_compress.arch.targets import Router, Target
from lowrank_compress.calibration.statistics import statistic_key
from lowrank_compress.formats.dense import dense
from lowrank_compress.formats.spec import Encoded
from lowrank_compress.methods.edit import Edit, Later, Replacement, Rerouted, Source
from lowrank_compress.methods.experts import ExpertMethod
from lowrank_compress.methods.groups import InPlace, Price, Weights, dense_elements
from lowrank_compress.methods.linear import Damping
from lowrank_compress.model.casting import cast


@dataclass(frozen=True)
class ExpertGroup(InPlace):
    """The experts of a block, of which the best are kept; the rank is how many experts, or units of all of them.

    The matrices are those of the first expert, then those of the next, each gate, up, down.
    """

    name: str
    targets: tuple[Target, ...]
    method: ExpertMethod
    path: str
    router: Router
    formats: tuple[str, ...] = ("width",)

    @property
    def block(self) -> int:
        """The targets'."""
        return self.targets[0].block

    @cached_property
    def experts(self) -> tuple[tuple[Target, ...], ...]:
        """The matrices of each expert."""
        numbers = dict.fromkeys(target.expert for target in self.targets)
        return tuple(tuple(target for target in self.targets if target.expert == number) for number in numbers)

    @property
    def widths(self) -> tuple[int, ...]:
        """How many of what is ranked each expert has: one where whole experts are."""
        return tuple(1 if self.method.whole else down_of(own).shape[1] for own in self.experts)

    @property
    def shape(self) -> tuple[int]:
        """How many there are to be kept."""
        return (sum(self.widths),)

    @property
    def identity(self) -> tuple[str, ...]:
        """The method."""
        return (self.method.name,)

    @property
    def nats(self) -> bool:
        """It is not: saliencies compare within a block."""
        return False

    @property
    def parallel(self) -> bool:
        """It is not: matrices of one expert at a time are in memory."""
        return False

    @property
    def loses_mean(self) -> bool:
        """What is kept stays as it is."""
        return False

    def statistics(self) -> Mapping[str, frozenset[str]]:
        """What the method needs of the down-projections."""
        return {t.name: self.method.statistics if t.role == "down" else frozenset() for t in self.targets}

    def choices(self, format: str, multiple: int = 1) -> Choices:
        """All numbers that store less; of whole experts at least as many as a token goes to, and no multiples."""
        (count,) = self.shape
        least, step = (self.router.chosen, 1) if self.method.whole else (0, multiple)
        kept = np.arange(least, count, step, dtype=np.int64)
        indices = kept if self.method.whole else np.zeros_like(kept)
        stored = kept * self._elements + indices
        paying = stored < dense_elements(self)
        return of_ranks("width", kept[paying], stored[paying], indices[paying])

    def parameters(self, format: str) -> tuple[str, ...]:
        """How many are kept, which is spelled as ranks are."""
        return ("rank",)

    def price(self, choice: Choice) -> Price:
        """Elements of what is kept, and of the list of the experts that the router still knows."""
        (kept,) = choice.parameters
        indices = kept if self.method.whole else 0
        return Price(kept * self._elements + indices, indices)

    def keep(self, choice: Choice) -> int:
        """How many; every basis serves all of them."""
        return choice.parameters[0]

    def kept(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """Every basis serves all choices."""

    @property
    def _elements(self) -> int:
        """Stored for each of what is kept."""
        return dense_elements(self) // self.shape[0]

    def decompose(
        self, weights: Weights, means: Mapping[str, Tensor], damping: Damping, keep: int
    ) -> dict[str, Tensor]:
        """Rank: ``order`` (n,) int64, the best first; ``tail`` (n + 1,) float64, what is lost where 0, 1, … stay."""
        found = []
        assert self.method.saliency is not None
        for own in self.experts:
            down = down_of(own)
            seen = {name: means[statistic_key(down, name)].cpu().double() for name in self.method.statistics}
            found.append(self.method.saliency(weights(down).cpu(), seen, damping.options))
        saliency = torch.cat(found)
        order = saliency.argsort(descending=True, stable=True)
        tail = torch.cat([saliency[order].flip(0).cumsum(0).flip(0), saliency.new_zeros(1)])
        return {f"{self.name}/order": order, f"{self.name}/tail": tail}

    def basis_elements(self, keep: int) -> int:
        """An order and losses, which have two numbers each."""
        return 4 * self.shape[0]

    def working_bytes(self) -> int:
        """One matrix, twice."""
        return torch.float64.itemsize * 2 * max(target.elements for target in self.targets)

    def losses(self, basis: Mapping[str, Tensor], choices: Choices, *, on_sample: bool = False) -> np.ndarray:
        """Σ of the saliencies of all that goes."""
        return basis[f"{self.name}/tail"].double().cpu().numpy()[choices.parameters[:, 0]]

    def total(self, basis: Mapping[str, Tensor], *, on_sample: bool = False) -> float:
        """That of all there is."""
        return float(basis[f"{self.name}/tail"][0])

    def encode(self, source: Source, choice: Choice, basis: Mapping[str, Tensor]) -> Edit:
        """Store what is kept, dense: experts with fewer hidden units, or none."""

        def smaller(target: Target, units: Tensor) -> Encoded:
            weight = source.weight(target)
            weight = weight[:, units] if target.role == "down" else weight[units]
            return dense(cast(weight.cpu(), source.dtype, f"The smaller {target.name}"))

        parts = {
            target.name: partial(smaller, target, units)
            for own, units in zip(self.experts, self._units(choice, basis), strict=True)
            for target in (own if len(units) < down_of(own).shape[1] else ())
        }
        biases = {
            target.name: source.bias(target)[units].cpu().double()
            for own, units in zip(self.experts, self._units(choice, basis), strict=True)
            for target in (own if len(units) < down_of(own).shape[1] else ())
            if target.bias is not None and target.role != "down"
        }
        return Edit(choice, Later(parts), biases, router=self._rerouted(choice, basis))

    def replace(self, source: Source, choice: Choice, basis: Mapping[str, Tensor]) -> Iterator[Replacement | Rerouted]:
        """Have the router leave experts out; or fill them up with zeros for the units that go."""
        rerouted = self._rerouted(choice, basis)
        if rerouted is not None:
            yield rerouted
            return
        for own, units in zip(self.experts, self._units(choice, basis), strict=True):
            for target in own if len(units) < down_of(own).shape[1] else ():
                weight, zeros = source.weight(target), torch.zeros_like(source.weight(target))
                side = 1 if target.role == "down" else 0
                yield Replacement(target, zeros.index_copy(side, units, weight.index_select(side, units)))

    def _best(self, choice: Choice, basis: Mapping[str, Tensor]) -> Tensor:
        """Which of all are kept, (rank,) int64, ascending."""
        return basis[f"{self.name}/order"].cpu()[: choice.parameters[0]].sort().values

    def _units(self, choice: Choice, basis: Mapping[str, Tensor]) -> list[Tensor]:
        """The hidden units that each expert keeps, ascending."""
        kept = torch.zeros(self.shape[0], dtype=torch.bool)
        kept[self._best(choice, basis)] = True
        if self.method.whole:
            return [
                torch.arange(down_of(own).shape[1] if here else 0) for own, here in zip(self.experts, kept, strict=True)
            ]
        return [here.nonzero().flatten() for here in kept.split(list(self.widths))]

    def _rerouted(self, choice: Choice, basis: Mapping[str, Tensor]) -> Rerouted | None:
        return Rerouted(self.path, self._best(choice, basis)) if self.method.whole else None


def down_of(own: Sequence[Target]) -> Target:
    """The down-projection among the matrices of an expert."""
    return next(target for target in own if target.role == "down")
