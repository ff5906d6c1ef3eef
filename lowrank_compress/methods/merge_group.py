"""All experts of a block as a group that is merged: the choice is how many are left."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lowrank_compress.allocation.choice import Choice, Choices, of_ranks
from lowrank_compress.arch.spec import Role
from lowrank_compress.arch.targets import Target
from lowrank_compress.calibration.statistics import LIKENESS, ROUTED, statistic_key
from lowrank_compress.formats.dense import dense
from lowrank_compress.methods.edit import Edit, Merged, Replacement, Source
from lowrank_compress.methods.expert_group import ExpertGroup, down_of
from lowrank_compress.methods.groups import Price, Weights, dense_elements
from lowrank_compress.methods.linear import Damping
from lowrank_compress.methods.merge import alignment, clusterings, leads_of, merged
from lowrank_compress.model.casting import cast
from lowrank_compress.options import ALIGN, SUBSPACE


@dataclass(frozen=True)
class MergeGroup(ExpertGroup):
    """The experts of a block, merged to fewer; the rank is how many are left, and `path` is that of the experts.

    The router keeps all its rows: tokens of one that was merged go to the one that leads its cluster.
    """

    @property
    def widths(self) -> tuple[int, ...]:
        """Whole experts are counted."""
        return (1,) * len(self.experts)

    def choices(self, format: str, multiple: int = 1) -> Choices:
        """All numbers that store less, from one on; no multiples."""
        (count,) = self.shape
        left = np.arange(1, count, dtype=np.int64)
        indices = np.full_like(left, count)
        stored = left * self._elements + indices
        paying = stored < dense_elements(self)
        return of_ranks("width", left[paying], stored[paying], indices[paying])

    def price(self, choice: Choice) -> Price:
        """Elements of those that are left, and of the list of who leads whom."""
        (count,) = self.shape
        return Price(choice.parameters[0] * self._elements + count, count)

    def decompose(
        self, weights: Weights, means: Mapping[str, Tensor], damping: Damping, keep: int
    ) -> dict[str, Tensor]:
        """Cluster into every number of clusters.

        ``leads`` (n, n) int64: row k − 1 says which expert leads each, of k; ``tail`` (n + 1,) float64: the squared
        distances to the centres of 0, 1, … clusters; ``shares`` (n,) float64, of the tokens; ``told`` (2,) float64, the
        options.
        """
        downs = [down_of(own) for own in self.experts]
        seen = {
            name: torch.stack([means[statistic_key(down, name)].cpu().double() for down in downs])
            for name in (LIKENESS, ROUTED)
        }
        shares = seen[ROUTED].flatten()
        labels, inertia = clusterings(seen[LIKENESS])
        # Without any expert there is nothing of what they make.
        whole = torch.maximum(seen[LIKENESS].diagonal().sum()[None], inertia[:1])
        told = [float(damping.options.get(option.name, option.default)) for option in (SUBSPACE, ALIGN)]  # pyright: ignore[reportArgumentType]
        return {
            f"{self.name}/leads": torch.stack([leads_of(own, shares) for own in labels]),
            f"{self.name}/tail": torch.cat([whole, inertia]),
            f"{self.name}/shares": shares,
            f"{self.name}/told": torch.tensor(told, dtype=torch.float64),
        }

    def basis_elements(self, keep: int) -> int:
        """Leads, which have two numbers each, and a few vectors."""
        return 2 * self.shape[0] ** 2

    def working_bytes(self) -> int:
        """The three matrices of two experts."""
        return torch.float64.itemsize * 2 * sum(target.elements for target in self.experts[0])

    def encode(self, source: Source, choice: Choice, basis: Mapping[str, Tensor]) -> Edit:
        """Store those that are left, dense, and nothing of the others."""
        parts, biases, leads = {}, {}, self._leads(choice, basis)
        for members, made in self._made(source, leads, basis):
            for target, (weight, bias) in zip(self.experts[members[0]], made, strict=True):
                parts[target.name] = dense(cast(weight.cpu(), source.dtype, f"The merged {target.name}"))
                if bias is not None:
                    biases[target.name] = bias.cpu()
            for target in (target for other in members[1:] for target in self.experts[other]):
                none = torch.empty((target.shape[0], 0) if target.role == "down" else (0, target.shape[1]))
                parts[target.name] = dense(none.to(source.dtype))
                if target.bias is not None and target.role != "down":
                    biases[target.name] = torch.empty(0, dtype=torch.float64)
        return Edit(choice, parts, biases, merged=Merged(self.path, leads))

    def replace(self, source: Source, choice: Choice, basis: Mapping[str, Tensor]) -> Iterator[Replacement]:
        """Give every expert the matrices of its cluster."""
        for members, made in self._made(source, self._leads(choice, basis), basis):
            for member in members:
                for target, (weight, bias) in zip(self.experts[member], made, strict=True):
                    yield Replacement(target, weight, bias)

    def _leads(self, choice: Choice, basis: Mapping[str, Tensor]) -> Tensor:
        return basis[f"{self.name}/leads"].cpu()[choice.parameters[0] - 1]

    def _made(
        self, source: Source, leads: Tensor, basis: Mapping[str, Tensor]
    ) -> Iterator[tuple[list[int], list[tuple[Tensor, Tensor | None]]]]:
        """For each cluster of several: who is in it, the leader first, and its matrices and biases, float64."""
        shares, told = basis[f"{self.name}/shares"].cpu(), basis[f"{self.name}/told"].tolist()
        for lead in leads.unique().tolist():
            members = [lead, *(m for m in (leads == lead).nonzero().flatten().tolist() if m != lead)]
            if len(members) > 1:
                yield members, self._merged(source, members, shares[members], *told)

    def _merged(
        self, source: Source, members: Sequence[int], shares: Tensor, subspace: float, align: float
    ) -> list[tuple[Tensor, Tensor | None]]:
        def read(target: Target) -> Tensor:
            return source.weight(target).to(source.device).double()

        def read_bias(target: Target) -> Tensor:
            return source.bias(target).to(source.device).double()

        orders: list[Tensor | None] = [None] * len(members)
        if align:
            first, *others = ({t.role: read(t) for t in self.experts[member]} for member in members)
            orders = [None, *(alignment(first, other) for other in others)]
        made = []
        for place in range(len(self.experts[members[0]])):
            same = [self.experts[member][place] for member in members]
            matrices = [_ordered(read(t), order, t.role) for t, order in zip(same, orders, strict=True)]
            weight, bias = merged(matrices, shares.to(matrices[0]), subspace), None
            if same[0].bias is not None:
                # Of output i, as is row i of the matrices.
                rows = [None if t.role == "down" else order for t, order in zip(same, orders, strict=True)]
                biases = [
                    read_bias(t) if order is None else read_bias(t)[order] for t, order in zip(same, rows, strict=True)
                ]
                bias = merged(biases, shares.to(weight), 1)
            made.append((weight, bias))
        return made


def _ordered(weight: Tensor, order: Tensor | None, role: Role) -> Tensor:
    """Put hidden units in another order."""
    if order is None:
        return weight
    return weight[:, order] if role == "down" else weight[order]
