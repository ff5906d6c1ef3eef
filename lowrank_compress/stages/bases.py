"""The decomposition of every unit in the method's metric, kept block by block up to the largest rank that can pay."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lowrank_compress.allocation.alternatives import choose
from lowrank_compress.allocation.choice import Choices
from lowrank_compress.allocation.curve import Curve, make_curve
from lowrank_compress.allocation.table import ALLOCATORS
from lowrank_compress.arch.resolve import Target
from lowrank_compress.artifacts.documents import canonical_hash
from lowrank_compress.artifacts.manifest import Manifest
from lowrank_compress.artifacts.tensors import BlockFiles
from lowrank_compress.calibration.statistics import INFLUENCE, SMALL, first_half
from lowrank_compress.config import ScoreConfig
from lowrank_compress.errors import InputError
from lowrank_compress.linalg.eigen import eigh
from lowrank_compress.linalg.metric import Identity
from lowrank_compress.linalg.weighted import smaller_side
from lowrank_compress.methods.linear import Damping
from lowrank_compress.methods.sites import Site, all_units, first_units
from lowrank_compress.methods.units import (
    Unit,
    dense_elements,
    largest_kept,
    ranking,
    statistics_bytes,
    uses,
)
from lowrank_compress.resources.behind import Behind
from lowrank_compress.resources.resources import Resources
from lowrank_compress.stages.reach import budget_of, require_reachable
from lowrank_compress.stages.subject import Subject

VERSION = 6
# From this ratio on predicted losses, which are of second order, decide little.
MUCH = 0.4


class Bases:
    """The decompositions of a run, block by block.

    As a `sinks.Sink` it makes them from blocks' statistics as soon as these are complete.

    Parameters
    ----------
    config
        Method, damping, and what decides which ranks can be asked for.
    subject
        The dense model, and what of it is compressed.
    calibration
        Id of the calibrate stage's result, which the statistics belong to.
    directory
        Where the basis files lie.
    resources
        What decompositions may use.
    prefix
        First part of the files' names.
    """

    step = "decompose"

    def __init__(
        self,
        config: ScoreConfig,
        subject: Subject,
        calibration: str,
        directory: Path,
        *,
        resources: Resources = Resources(),
        prefix: str = "basis",
    ) -> None:
        self.config = config
        self.resources = resources.on(config.device)
        self.allocator = ALLOCATORS[config.allocate]
        self.device = torch.device(config.device)
        self.damping = Damping(config.damping_fisher, config.damping_gram, config.alpha)
        self.blueprint = subject.model
        self.resolved = subject.resolved
        self.sites = subject.sites
        # Only predicted losses can tell which alternative is better; without them it is the first.
        self.units = all_units(self.sites) if self.allocator.needs_loss else first_units(self.sites)
        self.nats = all(unit.nats for unit in self.units)
        self.budget = budget_of(config, subject)
        self.keep = self._largest_ranks()
        identity = {
            "calibration": calibration,
            "version": VERSION,
            "units": sorted({unit.identity for unit in self.units}),
            "damping": [self.damping.fisher, self.damping.gram, self.damping.power],
            "device": config.device,
            "keep": [self.keep[unit.name] for unit in self.units],
        }
        self.files = BlockFiles(directory, canonical_hash(identity), prefix)
        self._behind = Behind()
        self.rival = self._rival(Subject(subject.model, subject.rival), calibration, directory)
        self.spectra = BlockFiles(directory, canonical_hash(identity | {"spectra": True}), "spectrum")

    def _rival(self, subject: Subject, calibration: str, directory: Path) -> Bases | None:
        """The bases of what plans are held against, at its own settings; None where little is removed.

        In small models they are made always, so that another ratio can be asked for when the statistics are gone.
        """
        config = self.config
        small = max(max(target.shape) for target in self.resolved.targets) <= SMALL
        if config.rival is None or not (small or config.ratio >= MUCH) or not self.allocator.needs_loss:
            return None
        own = {"scheme": config.rival, "allocate": "block-influence", "storage": "pair", "rival": None}
        with contextlib.suppress(InputError):  # the ratio is out of its reach
            settings = config.model_copy(update=own | {"held_out": False})
            return Bases(
                settings, subject, calibration, directory, resources=self.resources, prefix="rival",
            )  # fmt: skip
        return None

    def of_block(self, block: int) -> tuple[Unit, ...]:
        """Return the units of one block."""
        return tuple(unit for unit in self.units if unit.block == block)

    def _largest_ranks(self) -> dict[str, int]:
        """The largest rank of each unit that can pay; under an allocator that looks at nothing, the one it chooses."""
        paying = {unit.name: largest_kept(unit, ranking(unit, self.config.storage)) for unit in self.units}
        require_reachable(self.config, self.budget, self.sites)
        if self.allocator.needs_loss or self.allocator.needs_spectrum or self.allocator.needs_influence:
            return paying
        units = first_units(self.sites)
        curves = []
        for unit in units:
            choices = self._choices(unit)
            curves.append(self._curve(unit, choices, np.zeros(len(choices))))
        chosen = [curve.choice(point) for curve, point in zip(curves, self.allocate(curves), strict=True)]
        return {
            unit.name: 0 if choice.is_dense else unit.keep(choice) for unit, choice in zip(units, chosen, strict=True)
        }

    def _choices(self, unit: Unit) -> Choices:
        return unit.choices(ranking(unit, self.config.storage), self.config.round_to)

    def _curve(
        self,
        unit: Unit,
        choices: Choices,
        losses: np.ndarray,
        spectrum: np.ndarray | None = None,
        influence: float | None = None,
    ) -> Curve:
        return make_curve(
            unit.name,
            dense_elements(unit),
            choices.where(slice(len(losses))),
            losses,
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
        return self.files.finished(block) and (self.rival is None or self.rival.finished(block))

    @property
    def at_once(self) -> int:
        """How many blocks to decompose together; it changes no result."""
        return self.resources.blocks_at_once(statistics_bytes(self.of_block(self.units[0].block)))

    def take(self, blocks: Mapping[int, MutableMapping[str, Tensor]]) -> None:
        """Decompose blocks from their complete statistics, which are let go when they have served.

        The bases are written while the caller goes on, where they take little of the memory.
        """
        self.settle()
        if self.rival is not None:
            self.rival.take({block: dict(means) for block, means in blocks.items()})
        tensors: dict[int, dict[str, Tensor]] = {block: {} for block in blocks}
        units = [unit for block in blocks for unit in self.of_block(block)]
        alone = [unit for unit in units if not unit.parallel]
        # After those that go in threads, and the largest last, when there is most memory.
        alone.sort(key=lambda unit: max(uses(unit).values(), default=0))
        groups = [[unit for unit in units if unit.parallel], *([unit] for unit in alone)]

        def decompose(unit: Unit) -> dict[str, Tensor]:
            return unit.decompose(self._weight, blocks[unit.block], self.damping, self.keep[unit.name])

        for number, group in enumerate(groups):
            for unit, found in self._each(decompose, group):
                tensors[unit.block] |= found
            later = {(unit.block, key) for rest in groups[number + 1 :] for unit in rest for key in uses(unit)}
            for block, key in {(unit.block, key) for unit in group for key in uses(unit)} - later:
                del blocks[block][key]
                blocks[block].pop(first_half(key), None)
        for block, found in tensors.items():
            if INFLUENCE in blocks[block]:
                found[INFLUENCE] = blocks[block][INFLUENCE]
            here = {name: tensor.detach().cpu() for name, tensor in found.items()}
            self._behind.do(partial(self.files.write, block, here))
        if not self.resources.may_wait(sum(tensor.nbytes for found in tensors.values() for tensor in found.values())):
            self.settle()

    def settle(self) -> None:
        """Return when all blocks that were taken are on disk.

        Raises
        ------
        ArtifactError
            The disk is full.
        """
        self._behind.settle()
        if self.rival is not None:
            self.rival.settle()

    def _each(
        self, work: Callable[[Unit], dict[str, Tensor]], units: Sequence[Unit]
    ) -> list[tuple[Unit, dict[str, Tensor]]]:
        """Work on units, beside one another if all can be; pairs of a unit and what was found, in any order."""
        if not all(unit.parallel for unit in units):
            return [(unit, work(unit)) for unit in units]
        return self.resources.each(work, units, lambda unit: unit.working_bytes())

    def _weight(self, target: Target) -> Tensor:
        return self.blueprint.weight(target).to(self.device)

    def take_spectra(self, blocks: Sequence[int]) -> None:
        """Keep the singular values of blocks' weights themselves."""
        units = [unit for block in blocks for unit in self.of_block(block)]

        def singular_values(unit: Unit) -> dict[str, Tensor]:
            (target,) = unit.targets
            weight = self._weight(target)
            small = Identity().form(weight if smaller_side(target.shape) == "out" else weight.T)
            return {f"{unit.name}/singular_values": eigh(small)[0].sqrt()}

        tensors: dict[int, dict[str, Tensor]] = {block: {} for block in blocks}
        for unit, found in self._each(singular_values, units):
            tensors[unit.block] |= found
        for block, found in tensors.items():
            self.spectra.write(block, found)

    def choose(self, curves: Mapping[str, Curve]) -> tuple[Unit, ...]:
        """Return the units of the better alternative of each site."""
        ways = [[[curves[unit.name] for unit in way] for way in self._ways(site)] for site in self.sites]
        picked = choose(ways, self.budget.limit)
        return tuple(unit for site, number in zip(self.sites, picked, strict=True) for unit in self._ways(site)[number])

    def _ways(self, site: Site) -> tuple[tuple[Unit, ...], ...]:
        return site.alternatives if self.allocator.needs_loss else site.alternatives[:1]

    def halved(self) -> bool:
        """Whether any loss was taken on text that its fit was not made on."""
        return any(name.endswith("/held_out") for name in self.files.read(0))

    def curves(self, *, on_sample: bool = False) -> dict[str, Curve]:
        """(Stored elements, loss) of every unit at every rank that can pay, by the unit's name.

        Losses are those on text that the fits were not made on where these are known, or `on_sample` those on the same.
        """
        curves = {}
        for block in range(len(self.resolved.blocks)):
            tensors = self.files.read(block)
            spectra = self.spectra.read(block) if self.allocator.needs_spectrum else {}
            influence = float(tensors[INFLUENCE]) if INFLUENCE in tensors else None
            for unit in self.of_block(block):
                spectrum = spectra.get(f"{unit.name}/singular_values")
                choices = self._choices(unit)
                losses = predicted_losses(unit, tensors, choices, self.nats, on_sample=on_sample)
                values = None if spectrum is None else spectrum.numpy()
                curves[unit.name] = self._curve(unit, choices, losses, values, influence)
        return curves


def bases_of(directory: Path, scores: Manifest) -> BlockFiles:
    """Find the bases that the ranks of a score stage are of."""
    return BlockFiles(directory, scores.report["bases"], scores.report["bases_prefix"])


def predicted_losses(
    unit: Unit, basis: Mapping[str, Tensor], choices: Choices, nats: bool, *, on_sample: bool = False
) -> np.ndarray:
    """Predicted loss of the first choices of a unit, float64: nats per token, or a share of the unit's own total."""
    losses = unit.losses(basis, choices, on_sample=on_sample)
    if nats:
        return losses / 2
    total = unit.total(basis, on_sample=on_sample)
    return losses / total if total > 0 else np.zeros_like(losses)
