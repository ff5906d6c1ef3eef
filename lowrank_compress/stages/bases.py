"""The decomposition of every matrix in the method's metric, kept block by block up to the largest rank that can pay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lowrank_compress.allocation.budget import Budget
from lowrank_compress.allocation.curve import DENSE, Curve, linear_curve
from lowrank_compress.allocation.storage import cost, largest_rank
from lowrank_compress.allocation.table import ALLOCATORS
from lowrank_compress.arch.resolve import Target
from lowrank_compress.artifacts.manifest import canonical_hash
from lowrank_compress.artifacts.tensors import BlockFiles
from lowrank_compress.config import ScoreConfig
from lowrank_compress.linalg.eigen import eigh
from lowrank_compress.linalg.weighted import Projector
from lowrank_compress.methods.linear import Damping, decompose_target, sensitivities
from lowrank_compress.methods.table import METHODS
from lowrank_compress.model.blueprint import Blueprint, blueprint
from lowrank_compress.model.checkpoint import Checkpoint

VERSION = 1


class Bases:
    """The decompositions of a run, block by block.

    As a `calibrate.Sink` it makes each from a block's statistics at once.

    Parameters
    ----------
    config
        Method, damping, and what decides which ranks can be asked for.
    checkpoint
        The dense checkpoint.
    calibration
        Id of the calibrate stage's result, which the statistics belong to.
    directory
        Where the basis files lie.
    """

    def __init__(self, config: ScoreConfig, checkpoint: Checkpoint, calibration: str, directory: Path) -> None:
        self.config = config
        self.method = METHODS[config.method]
        self.device = torch.device(config.device)
        self.damping = Damping(config.damping_fisher, config.damping_gram, config.alpha)
        self.blueprint = blueprint(checkpoint)
        self.resolved = self.blueprint.resolved
        self.budget = budget_of(config, self.blueprint)
        self.keep = self._largest_ranks()
        identity = {
            "calibration": calibration,
            "version": VERSION,
            "damping": [self.damping.fisher, self.damping.gram, self.damping.power],
            "device": config.device,
            "keep": [self.keep[target.name] for target in self.resolved.targets],
        }
        self.files = BlockFiles(directory, canonical_hash(identity), "basis")
        self.spectra = BlockFiles(directory, canonical_hash(identity | {"spectra": True}), "spectrum")

    def _largest_ranks(self) -> dict[str, int]:
        """The largest rank of each matrix that can pay; under an allocator that ignores losses, the one it chooses."""
        storage, targets = self.config.storage, self.resolved.targets
        paying = {target.name: _paying(storage, target.shape) for target in targets}
        allocator = ALLOCATORS[self.config.allocate]
        curves = [
            linear_curve(target.name, target.shape, np.zeros(paying[target.name] + 1), _cost(storage, target.shape))
            for target in targets
        ]
        self.budget.check(curves)
        if allocator.needs_loss or allocator.needs_spectrum:
            return paying
        chosen = self.allocate(curves)
        return {
            curve.name: 0 if curve.ranks[point] == DENSE else int(curve.ranks[point])
            for curve, point in zip(curves, chosen, strict=True)
        }

    def allocate(self, curves: Sequence[Curve]) -> np.ndarray:
        """Choose a point of each curve under the budget, (curves,) int64."""
        options = {"floor": self.config.floor} if self.config.allocate == "loss" else {}
        return ALLOCATORS[self.config.allocate].allocate(curves, self.budget.limit, **options)

    def finished(self, block: int) -> bool:
        """Whether the block is decomposed."""
        return self.files.finished(block)

    def take(self, block: int, means: Mapping[str, Tensor]) -> None:
        """Decompose a block from its complete statistics."""
        tensors: dict[str, Tensor] = {}
        for target in self.resolved.of_block(block):
            projector = decompose_target(
                self.method,
                target,
                self.blueprint.weight(target).to(self.device),
                means,
                self.damping,
                max(self.keep[target.name], 1),
            )
            keep = self.keep[target.name]
            rows, columns = sensitivities(self.method, target, means, self.damping)
            tensors |= {
                f"{target.name}/values": projector.values,
                f"{target.name}/total": torch.tensor(projector.total, dtype=torch.float64),
                f"{target.name}/expand": projector.expand[:, :keep].float(),
                f"{target.name}/out_sensitivity": rows.clone(),
                f"{target.name}/in_sensitivity": columns.clone(),
            }
            # Without a near metric the two are transposes of each other: keep one.
            if self.method.sides(target)[0].near:
                tensors[f"{target.name}/contract"] = projector.contract[:keep].float()
            if self.method.restores_mean(target):
                tensors[f"{target.name}/mean"] = means[f"{target.reads}/in_mean"].clone()
        self.files.write(block, tensors)

    def take_spectrum(self, block: int) -> None:
        """Keep the singular values of a block's weights themselves."""
        tensors = {}
        for target in self.resolved.of_block(block):
            weight = self.blueprint.weight(target).to(self.device).double()
            small = weight @ weight.T if weight.shape[0] <= weight.shape[1] else weight.T @ weight
            tensors[f"{target.name}/singular_values"] = eigh(small)[0].sqrt()
        self.spectra.write(block, tensors)

    def curves(self) -> list[Curve]:
        """(Stored elements, loss) of every matrix at every rank that can pay."""
        curves = []
        wants_spectrum = ALLOCATORS[self.config.allocate].needs_spectrum
        for block in range(len(self.resolved.blocks)):
            tensors = self.files.read(block)
            spectra = self.spectra.read(block) if wants_spectrum else {}
            for target in self.resolved.of_block(block):
                tail = predicted_losses(self.method.unit, tensors, target).numpy()
                spectrum = spectra.get(f"{target.name}/singular_values")
                largest = _paying(self.config.storage, target.shape)
                curves.append(
                    linear_curve(
                        target.name,
                        target.shape,
                        tail[: largest + 1],
                        _cost(self.config.storage, target.shape),
                        spectrum=None if spectrum is None else spectrum.numpy(),
                    )
                )
        return curves


def predicted_losses(unit: str, tensors: Mapping[str, Tensor], target: Target) -> Tensor:
    """Predicted loss of a matrix at rank 0, 1, …, float64: nats per token, or a share of the matrix's own total."""
    expand = tensors[f"{target.name}/expand"]  # only its size counts here
    total = float(tensors[f"{target.name}/total"])
    tail = Projector(tensors[f"{target.name}/values"], total, expand, expand.T).tail()
    if unit == "nats":
        return tail / 2
    return tail / total if total > 0 else torch.zeros_like(tail)


def projector_of(tensors: Mapping[str, Tensor], target: Target) -> Projector:
    """Read a matrix's projector from a basis file's tensors, in float64."""
    expand = tensors[f"{target.name}/expand"].double()
    contract = tensors.get(f"{target.name}/contract")
    return Projector(
        tensors[f"{target.name}/values"],
        float(tensors[f"{target.name}/total"]),
        expand,
        expand.T if contract is None else contract.double(),
    )


def _cost(storage: str, shape: tuple[int, int]):
    return lambda ranks: cost(storage, shape, ranks)


def _paying(storage: str, shape: tuple[int, int]) -> int:
    """The largest rank that is stored in fewer elements than the dense matrix, and below the matrix's own."""
    return min(largest_rank(storage, shape, shape[0] * shape[1] - 1), min(shape) - 1)


def budget_of(config: ScoreConfig, plan: Blueprint) -> Budget:
    """The budget that a ratio means for a checkpoint.

    Raises
    ------
    InputError
        The ratio is not between 0 and 1.
    """
    claimed = sum(target.elements for target in plan.resolved.targets)
    whole = sum(parameter.numel() for parameter in plan.model.parameters())
    denominator = claimed if config.ratio_of == "blocks" else whole
    return Budget(config.ratio, denominator, denominator - claimed)
