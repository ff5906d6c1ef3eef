"""The decomposition of every group in the method's metric, kept block by block up to the largest rank that can pay."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from lowrank_compress.allocation.curve import Curve
from lowrank_compress.arch.targets import Target
from lowrank_compress.artifacts.documents import canonical_hash
from lowrank_compress.artifacts.manifest import Manifest
from lowrank_compress.artifacts.tensors import BlockFiles
from lowrank_compress.calibration.experts import of_experts
from lowrank_compress.calibration.statistics import INFLUENCE, first_half
from lowrank_compress.linalg.eigen import eigh
from lowrank_compress.linalg.metric import Identity
from lowrank_compress.linalg.weighted import smaller_side
from lowrank_compress.methods.declared import options_of
from lowrank_compress.methods.groups import TargetGroup, statistics_bytes, uses
from lowrank_compress.methods.linear import Damping
from lowrank_compress.methods.scale import scales_of
from lowrank_compress.model.skeleton import Skeleton
from lowrank_compress.options import ALPHA, only
from lowrank_compress.resources.behind import Behind
from lowrank_compress.resources.resources import Resources
from lowrank_compress.stages.choose import Chooser
from lowrank_compress.stages.curves import read_curves

VERSION = 7


class Bases:
    """The decompositions of a run, block by block, with those of what its plans are held against.

    As a `sinks.Sink` it makes them from blocks' statistics as soon as these are complete.

    Parameters
    ----------
    chooser
        Which groups there are, and up to which rank each is kept.
    calibration
        Id of the calibrate stage's result, which the statistics belong to.
    directory
        Where the files lie.
    resources
        What decompositions may use.
    prefix
        First part of the files' names.

    Attributes
    ----------
    files
        The bases.
    spectra
        Singular values of the weights themselves; None where the allocator does not look at them.
    rival
        The decompositions of `Chooser.rival`.
    """

    step = "decompose"

    def __init__(
        self,
        chooser: Chooser,
        calibration: str,
        directory: Path,
        *,
        resources: Resources = Resources(),
        prefix: str = "basis",
    ) -> None:
        config = chooser.config
        self.chooser = chooser
        self.device = torch.device(config.device)
        self._resources = resources.on(config.device)
        told = only(options_of(config.scheme), config.options)
        self._damping = Damping(config.damping_fisher, config.damping_gram, told)
        self._behind = Behind()
        identity = {
            "calibration": calibration,
            "version": VERSION,
            "units": sorted({group.identity for group in chooser.groups}),
            "damping": [self._damping.fisher, self._damping.gram, self._damping.power],
            "device": config.device,
            "keep": [chooser.keep[group.name] for group in chooser.groups],
        }
        # The power stands above, whether a method declares it or not, so that files keep the names they have.
        if others := {name: value for name, value in told.items() if name != ALPHA.name}:
            identity["options"] = others
        self.files = BlockFiles(directory, canonical_hash(identity), prefix)
        self.spectra = None
        if chooser.allocator.needs_spectrum:
            self.spectra = BlockFiles(directory, canonical_hash(identity | {"spectra": True}), "spectrum")
        self.rival = None
        if chooser.rival is not None:
            self.rival = Bases(chooser.rival, calibration, directory, resources=resources, prefix="rival")

    def finished(self, block: int) -> bool:
        """Whether the block is decomposed."""
        return self.files.finished(block) and (self.rival is None or self.rival.finished(block))

    @property
    def at_once(self) -> int:
        """How many blocks to decompose together; it changes no result."""
        groups = self.chooser.groups
        return self._resources.blocks_at_once(statistics_bytes(self.chooser.of_block(groups[0].block)))

    def take(self, blocks: Mapping[int, MutableMapping[str, Tensor]]) -> None:
        """Decompose blocks from their complete statistics, which are let go when they have served.

        The bases are written while the caller goes on, where they take little of the memory.
        """
        self.flush()
        if self.rival is not None:
            self.rival.take({block: dict(means) for block, means in blocks.items()})
        # Before groups that are made of it let it go.
        tensors: dict[int, dict[str, Tensor]] = {
            block: of_experts(means) | scales_of(self.chooser.of_block(block), means) for block, means in blocks.items()
        }
        groups = [group for block in blocks for group in self.chooser.of_block(block)]
        alone = [group for group in groups if not group.parallel]
        # After those that go in threads, and the largest last, when there is most memory.
        alone.sort(key=lambda group: max(uses(group).values(), default=0))
        turns = [[group for group in groups if group.parallel], *([group] for group in alone)]

        def decompose(group: TargetGroup) -> dict[str, Tensor]:
            return group.decompose(self._weight, blocks[group.block], self._damping, self.chooser.keep[group.name])

        for number, turn in enumerate(turns):
            for group, found in self._each(decompose, turn):
                tensors[group.block] |= found
            later = {(group.block, key) for rest in turns[number + 1 :] for group in rest for key in uses(group)}
            for block, key in {(group.block, key) for group in turn for key in uses(group)} - later:
                del blocks[block][key]
                blocks[block].pop(first_half(key), None)
        for block, found in tensors.items():
            if INFLUENCE in blocks[block]:
                found[INFLUENCE] = blocks[block][INFLUENCE]
            here = {name: tensor.detach().cpu() for name, tensor in found.items()}
            self._behind.do(partial(self.files.write, block, here))
        if not self._resources.may_wait(sum(tensor.nbytes for found in tensors.values() for tensor in found.values())):
            self.flush()

    def dense(self) -> Skeleton:
        """Return the dense model as it is run, one expert at a time in memory where a block has too many."""
        checkpoint, room = self.chooser.subject.checkpoint, self._resources.for_experts
        return Skeleton(checkpoint, self.device, torch.float32, for_experts=room)

    def flush(self) -> None:
        """Return when all blocks that were taken are on disk.

        Raises
        ------
        ArtifactError
            The disk is full.
        """
        self._behind.flush()
        if self.rival is not None:
            self.rival.flush()

    def _each(
        self, work: Callable[[TargetGroup], dict[str, Tensor]], groups: Sequence[TargetGroup]
    ) -> list[tuple[TargetGroup, dict[str, Tensor]]]:
        """Work on groups, beside one another if all can be; pairs of a group and what was found, in any order."""
        if not all(group.parallel for group in groups):
            return [(group, work(group)) for group in groups]
        return self._resources.each(work, groups, lambda group: group.working_bytes())

    def _weight(self, target: Target) -> Tensor:
        return self.chooser.subject.model.weight(target).to(self.device)

    def take_spectra(self, blocks: Sequence[int]) -> None:
        """Keep the singular values of blocks' weights themselves, where the allocator looks at them."""
        if self.spectra is None:
            return
        missing = [block for block in blocks if not self.spectra.finished(block)]
        groups = [
            group for block in missing for group in self.chooser.of_block(block) if group not in self.chooser.cache
        ]

        def singular_values(group: TargetGroup) -> dict[str, Tensor]:
            (target,) = group.targets
            weight = self._weight(target)
            small = Identity().form(weight if smaller_side(target.shape) == "out" else weight.T)
            return {f"{group.name}/singular_values": eigh(small)[0].sqrt()}

        tensors: dict[int, dict[str, Tensor]] = {block: {} for block in missing}
        for group, found in self._each(singular_values, groups):
            tensors[group.block] |= found
        for block, found in tensors.items():
            self.spectra.write(block, found)

    def names(self, blocks: Sequence[int]) -> list[str]:
        """Name all files of some blocks: bases, those of the rival, and spectra."""
        kept = [self.files, None if self.rival is None else self.rival.files, self.spectra]
        return [files.name(block) for files in kept if files is not None for block in blocks]

    def halved(self) -> bool:
        """Whether any loss was taken on text that its fit was not made on."""
        return any(name.endswith("/held_out") for name in self.files.shapes(self.chooser.groups[0].block))

    def scales(self) -> dict[str, float]:
        """Return what to multiply the losses of each group with for the sake of sequences; empty if that is unknown."""
        found = {}
        for block in self.chooser.subject.scopes:
            scales = self.files.read(block, lambda name: name.endswith("/scale"))
            found |= {name.removesuffix("/scale"): float(scale) for name, scale in scales.items()}
        return found if found.keys() == {group.name for group in self.chooser.groups} else {}

    def curves(self, *, on_sample: bool = False) -> dict[str, Curve]:
        """Make the curves of all groups, by name; see :func:`read_curves`."""
        chooser = self.chooser
        return read_curves(
            chooser.config, chooser.groups, self.files, self.spectra, yardsticks=chooser.yardsticks, on_sample=on_sample
        )


def bases_of(directory: Path, scores: Manifest) -> BlockFiles:
    """Find the bases that the ranks of a score stage are of."""
    return BlockFiles(directory, scores.report["bases"], scores.report["bases_prefix"])
