"""The decomposition of every unit in the method's metric, kept block by block up to the largest rank that can pay."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lowrank_compress.allocation.alternatives import choose
from lowrank_compress.allocation.budget import Budget
from lowrank_compress.allocation.curve import DENSE, Curve, make_curve
from lowrank_compress.allocation.table import ALLOCATORS
from lowrank_compress.arch.resolve import Target
from lowrank_compress.artifacts.manifest import canonical_hash
from lowrank_compress.artifacts.tensors import BlockFiles
from lowrank_compress.calibration.statistics import INFLUENCE, statistic_key
from lowrank_compress.config import ScoreConfig
from lowrank_compress.linalg.eigen import eigh
from lowrank_compress.linalg.metric import Identity
from lowrank_compress.linalg.threads import in_threads
from lowrank_compress.linalg.weighted import smaller_side
from lowrank_compress.methods.linear import Damping
from lowrank_compress.methods.sites import Site, all_units, first_units, sites_of
from lowrank_compress.methods.units import MatrixUnit, Unit, candidate_ranks, dense_elements
from lowrank_compress.model.blueprint import Blueprint, blueprint
from lowrank_compress.model.checkpoint import Checkpoint
from lowrank_compress.model.memory import free_memory

VERSION = 4


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
    memory
        Bytes to get by with; None for what is free. It changes no result.
    processes
        How many share what is free.
    """

    step = "decompose"

    def __init__(
        self,
        config: ScoreConfig,
        checkpoint: Checkpoint,
        calibration: str,
        directory: Path,
        *,
        memory: int | None = None,
        processes: int = 1,
    ) -> None:
        self.config = config
        self.memory, self.processes = memory, processes
        self.allocator = ALLOCATORS[config.allocate]
        self.device = torch.device(config.device)
        self.damping = Damping(config.damping_fisher, config.damping_gram, config.alpha)
        self.blueprint = blueprint(checkpoint)
        self.resolved = self.blueprint.resolved
        self.sites = sites_of(self.resolved, config.scheme)
        # Only predicted losses can tell which alternative is better; without them it is the first.
        self.units = all_units(self.sites) if self.allocator.needs_loss else first_units(self.sites)
        self.nats = all(unit.nats for unit in self.units)
        self.budget = budget_of(config, self.blueprint, self.sites)
        self.keep = self._largest_ranks()
        identity = {
            "calibration": calibration,
            "version": VERSION,
            "units": sorted({unit.identity for unit in self.units}),
            "damping": [self.damping.fisher, self.damping.gram, self.damping.power],
            "device": config.device,
            "keep": [self.keep[unit.name] for unit in self.units],
        }
        self.files = BlockFiles(directory, canonical_hash(identity), "basis")
        self.spectra = BlockFiles(directory, canonical_hash(identity | {"spectra": True}), "spectrum")

    def of_block(self, block: int) -> tuple[Unit, ...]:
        """Return the units of one block."""
        return tuple(unit for unit in self.units if unit.block == block)

    def _largest_ranks(self) -> dict[str, int]:
        """The largest rank of each unit that can pay; under an allocator that looks at nothing, the one it chooses."""
        paying = {unit.name: unit.largest(self.config.storage) for unit in self.units}
        curves = [self._curve(unit, np.zeros(paying[unit.name] + 1)) for unit in first_units(self.sites)]
        self.budget.check(curves)
        if self.allocator.needs_loss or self.allocator.needs_spectrum or self.allocator.needs_influence:
            return paying
        chosen = self.allocate(curves)
        return {
            curve.name: 0 if curve.ranks[point] == DENSE else int(curve.ranks[point])
            for curve, point in zip(curves, chosen, strict=True)
        }

    def _curve(
        self, unit: Unit, tail: np.ndarray, spectrum: np.ndarray | None = None, influence: float | None = None
    ) -> Curve:
        ranks = candidate_ranks(unit, self.config.storage, self.config.round_to)
        ranks = ranks[ranks < len(tail)]
        return make_curve(
            unit.name,
            dense_elements(unit),
            ranks,
            unit.stored(ranking(unit, self.config.storage), ranks),
            tail[ranks],
            spectrum=spectrum,
            block=unit.block,
            influence=influence,
        )

    def allocate(self, curves: Sequence[Curve]) -> np.ndarray:
        """Choose a point of each curve under the budget, (curves,) int64; the curves are those of one alternative."""
        options = {name: getattr(self.config, name) for name in self.allocator.options}
        return self.allocator.allocate(curves, self.budget.limit, **options)

    def finished(self, block: int) -> bool:
        """Whether the block is decomposed."""
        return self.files.finished(block)

    def take(self, block: int, means: MutableMapping[str, Tensor]) -> None:
        """Decompose a block from its complete statistics, which are let go when they have served."""
        tensors: dict[str, Tensor] = {}
        units = self.of_block(block)
        uses = {
            unit.name: {
                statistic_key(target, name) for target in unit.targets for name in unit.statistics()[target.name]
            }
            for unit in units
        }
        modules = [unit for unit in units if not isinstance(unit, MatrixUnit)]
        # The largest comes last, when there is most room.
        modules.sort(key=lambda unit: max((means[key].numel() for key in uses[unit.name]), default=0))
        groups = [[unit for unit in units if isinstance(unit, MatrixUnit)], *([unit] for unit in modules)]

        def decompose(unit: Unit) -> dict[str, Tensor]:
            return unit.decompose(self._weight, means, self.damping, self.keep[unit.name])

        for number, group in enumerate(groups):
            for found in self._each(decompose, group):
                tensors |= found
            later = [uses[unit.name] for rest in groups[number + 1 :] for unit in rest]
            for key in set().union(*(uses[unit.name] for unit in group)).difference(*later):
                del means[key]
        if INFLUENCE in means:
            tensors[INFLUENCE] = means[INFLUENCE]
        self.files.write(block, tensors)

    def _each(self, work: Callable[[Unit], dict[str, Tensor]], units: Sequence[Unit]) -> list[dict[str, Tensor]]:
        """Work on units of a block: on a CPU on several matrices at a time, as far as memory allows."""
        if self.device.type != "cpu" or not all(isinstance(unit, MatrixUnit) for unit in units):
            return [work(unit) for unit in units]
        # The other half is for hidden states.
        room = (free_memory() // self.processes if self.memory is None else self.memory) // 2
        # The longest first, so that none is left to run alone.
        order = sorted(units, key=lambda unit: -unit.working_bytes())
        return in_threads(work, order, max(1, room // max((unit.working_bytes() for unit in order), default=1)))

    def _weight(self, target: Target) -> Tensor:
        return self.blueprint.weight(target).to(self.device)

    def take_spectrum(self, block: int) -> None:
        """Keep the singular values of a block's weights themselves."""
        tensors: dict[str, Tensor] = {}

        def singular_values(unit: Unit) -> dict[str, Tensor]:
            (target,) = unit.targets
            weight = self._weight(target)
            small = Identity().form(weight if smaller_side(target.shape) == "out" else weight.T)
            return {f"{unit.name}/singular_values": eigh(small)[0].sqrt()}

        for found in self._each(singular_values, self.of_block(block)):
            tensors |= found
        self.spectra.write(block, tensors)

    def choose(self, curves: Mapping[str, Curve]) -> tuple[Unit, ...]:
        """Return the units of the better alternative of each site."""
        ways = [[[curves[unit.name] for unit in way] for way in self._ways(site)] for site in self.sites]
        picked = choose(ways, self.budget.limit)
        return tuple(unit for site, number in zip(self.sites, picked, strict=True) for unit in self._ways(site)[number])

    def _ways(self, site: Site) -> tuple[tuple[Unit, ...], ...]:
        return site.alternatives if self.allocator.needs_loss else site.alternatives[:1]

    def curves(self) -> dict[str, Curve]:
        """(Stored elements, loss) of every unit at every rank that can pay, by the unit's name."""
        curves = {}
        for block in range(len(self.resolved.blocks)):
            tensors = self.files.read(block)
            spectra = self.spectra.read(block) if self.allocator.needs_spectrum else {}
            influence = float(tensors[INFLUENCE]) if INFLUENCE in tensors else None
            for unit in self.of_block(block):
                spectrum = spectra.get(f"{unit.name}/singular_values")
                tail = predicted_losses(unit, tensors, self.nats).numpy()
                values = None if spectrum is None else spectrum.numpy()
                curves[unit.name] = self._curve(unit, tail, values, influence)
        return curves


def predicted_losses(unit: Unit, basis: Mapping[str, Tensor], nats: bool) -> Tensor:
    """Predicted loss of a unit at rank 0, 1, …, float64: nats per token, or a share of the unit's own total."""
    tail = unit.tail(basis)
    if nats:
        return tail / 2
    return tail / tail[0] if tail[0] > 0 else torch.zeros_like(tail)


def ranking(unit: Unit, storage: str) -> str:
    """The format in which ranks of a unit are counted: the storage asked for, where it has any choice."""
    return storage if storage in unit.formats else unit.formats[0]


def budget_of(config: ScoreConfig, plan: Blueprint, sites: Sequence[Site]) -> Budget:
    """The budget that a ratio means for a checkpoint.

    Raises
    ------
    InputError
        The ratio is not between 0 and 1.
    """
    claimed = sum(target.elements for target in plan.resolved.targets)
    whole = sum(parameter.numel() for parameter in plan.model.parameters())
    denominator = claimed if config.ratio_of == "blocks" else whole
    return Budget(config.ratio, denominator, denominator - sum(site.dense for site in sites))
