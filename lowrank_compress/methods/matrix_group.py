"""One matrix as a group: it is given a choice of its own, and a linear method finds its factors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lowrank_compress.allocation.choice import Choice, Choices
from lowrank_compress.arch.targets import Target
from lowrank_compress.calibration.statistics import statistic_key
from lowrank_compress.errors import InputError
from lowrank_compress.formats.spec import Product
from lowrank_compress.formats.table import FORMATS, choices_of, cost_of, rebuild
from lowrank_compress.linalg.weighted import Projector
from lowrank_compress.methods.edit import Edit, Replacement, Source
from lowrank_compress.methods.groups import InPlace, Price, Weights, uses
from lowrank_compress.methods.halves import halves_of
from lowrank_compress.methods.linear import Damping, LinearMethod, decompose_target, fit_held_out, sensitivities


@dataclass(frozen=True)
class MatrixGroup(InPlace):
    """One matrix, compressed by a linear method."""

    target: Target
    method: LinearMethod

    @property
    def formats(self) -> tuple[str, ...]:
        """All of the table."""
        return tuple(FORMATS)

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
        """Whether the method's group is nats."""
        return self.method.unit == "nats"

    @property
    def parallel(self) -> bool:
        """It is: one thread is hardly slower on one matrix than several."""
        return True

    @property
    def loses_mean(self) -> bool:
        """Whether the method would restore the mean, but cannot here."""
        return self.method.right.centred and not self.method.restores_mean(self.target)

    def statistics(self) -> Mapping[str, frozenset[str]]:
        """What the method needs for a matrix of this shape."""
        return {self.target.name: self.method.statistics(self.target)}

    def choices(self, format: str, multiple: int = 1) -> Choices:
        """Those of the format."""
        return choices_of(FORMATS[format], self.shape, multiple)

    def parameters(self, format: str) -> tuple[str, ...]:
        """Those of the format."""
        return FORMATS[format].parameters

    def price(self, choice: Choice) -> Price:
        """That of the format."""
        return Price(*cost_of(FORMATS[choice.format], self.shape, choice.parameters))

    def keep(self, choice: Choice) -> int:
        """The rank, whatever the format makes of it."""
        return FORMATS[choice.format].rank(choice.parameters)

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

    def tail(self, basis: Mapping[str, Tensor], *, on_sample: bool = False) -> Tensor:
        """Squared metric loss at rank 0, 1, …, as far as the basis was kept: (… + 1,) float64."""
        held_out = basis.get(f"{self.name}/held_out")
        if held_out is not None and not on_sample:
            return held_out.double().cpu()
        expand = basis[f"{self.name}/expand"]  # only its size counts here
        total = float(basis[f"{self.name}/total"])
        return Projector(basis[f"{self.name}/values"], total, expand, expand.T).tail()

    def losses(self, basis: Mapping[str, Tensor], choices: Choices, *, on_sample: bool = False) -> np.ndarray:
        """Those of the format, from the losses of the best approximations."""
        tail, format = self.tail(basis, on_sample=on_sample).numpy(), FORMATS[choices.format]
        ranks = np.array([format.rank(tuple(p)) for p in choices.parameters.tolist()], dtype=np.int64)
        return format.losses(tail, choices.parameters[ranks < len(tail)])

    def total(self, basis: Mapping[str, Tensor], *, on_sample: bool = False) -> float:
        """That of rank 0."""
        return float(self.tail(basis, on_sample=on_sample)[0])

    def encode(self, source: Source, choice: Choice, basis: Mapping[str, Tensor]) -> Edit:
        """Factor the matrix; where the mean input is restored, what is lost of its image goes into the bias."""
        product = self._product(source, choice, basis, source.precise)
        part = FORMATS[choice.format].encode(product, choice.parameters)
        biases = {}
        if (mean := basis.get(f"{self.name}/mean")) is not None:
            lost = product.weight.cpu().double() - rebuild(part)
            biases[self.name] = source.bias(self.target).double() + lost @ mean
        return Edit(Choice(part.format, part.parameters), {self.name: part}, biases)

    def replace(self, source: Source, choice: Choice, basis: Mapping[str, Tensor]) -> list[Replacement]:
        """Multiply the factors out, in single precision."""
        product = self._product(source, choice, basis, torch.float32)
        return [Replacement(self.target, FORMATS[choice.format].approximate(product, choice.parameters))]

    def _product(self, source: Source, choice: Choice, basis: Mapping[str, Tensor], precise: torch.dtype) -> Product:
        kept, rank = basis[f"{self.name}/expand"].shape[1], self.keep(choice)
        if rank > kept:
            raise InputError(
                f"{self.name} asks for rank {rank}, but its basis was kept up to rank {kept}. Repeat `lrc score` with "
                "--allocate loss, which keeps every rank that can pay, or lower the rank in ranks.json."
            )
        return self.product(source, basis, precise)

    def product(self, source: Source, basis: Mapping[str, Tensor], precise: torch.dtype = torch.float32) -> Product:
        """Say what is to be encoded: the best approximations of all ranks up to that of the basis."""
        rows, columns = (basis[f"{self.name}/{side}_sensitivity"] for side in ("out", "in"))
        weight, projector = source.weight(self.target).to(source.device), self.projector(basis, precise)
        return Product(self.name, weight, projector, (rows, columns), source.dtype, source.multiple)

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
