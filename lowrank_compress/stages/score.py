"""Stage 2: decompose each matrix in the method's metric, and choose ranks under the budget.

Writes a basis file a block (kept up to the largest rank that can pay) and ranks.json, which people may edit.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lowrank_compress.allocation.budget import Budget
from lowrank_compress.allocation.curve import DENSE, Curve, linear_curve
from lowrank_compress.allocation.storage import STORAGES, cost, largest_rank
from lowrank_compress.allocation.table import ALLOCATORS
from lowrank_compress.arch.resolve import Target
from lowrank_compress.artifacts.files import sha256
from lowrank_compress.artifacts.manifest import Key, Manifest, altered, canonical_hash, commit, committed, read_manifest
from lowrank_compress.artifacts.tensors import BlockFiles
from lowrank_compress.config import ScoreConfig
from lowrank_compress.errors import ArtifactError, InputError
from lowrank_compress.linalg.eigen import eigh
from lowrank_compress.linalg.weighted import Projector
from lowrank_compress.methods.linear import Damping, decompose_target, sensitivities
from lowrank_compress.methods.table import METHODS
from lowrank_compress.model.blueprint import Blueprint, blueprint
from lowrank_compress.model.checkpoint import Checkpoint
from lowrank_compress.registry import unknown
from lowrank_compress.stages.common import Reporter, Silent, environment
from lowrank_compress.stages.ranks import RANKS, RANKS_BACKUP, Choice, write_ranks

VERSION = 1


@dataclass(frozen=True)
class Inputs:
    """What the stage reads.

    Attributes
    ----------
    checkpoint
        The dense checkpoint.
    calibration
        Key of the calibrate stage, whose id identifies the statistics, kept or not.
    statistics
        Directory of the statistics; not read for blocks that are decomposed already.
    """

    checkpoint: Checkpoint
    calibration: Key
    statistics: Path


class Bases:
    """The decompositions of a run, block by block; as a `calibrate.Sink` it makes each from the statistics at once."""

    def __init__(self, config: ScoreConfig, inputs: Inputs, out_dir: Path) -> None:
        self.config = config
        self.method = METHODS[config.method]
        self.device = torch.device(config.device)
        self.damping = Damping(config.damping_fisher, config.damping_gram, config.alpha)
        self.blueprint = blueprint(inputs.checkpoint)
        self.resolved = self.blueprint.resolved
        self.budget = budget_of(config, self.blueprint)
        self.keep = self._largest_ranks()
        identity = {
            "calibration": inputs.calibration.id,
            "version": VERSION,
            "damping": [self.damping.fisher, self.damping.gram, self.damping.power],
            "device": config.device,
            "keep": [self.keep[target.name] for target in self.resolved.targets],
        }
        self.files = BlockFiles(out_dir, canonical_hash(identity), "basis")
        self.spectra = BlockFiles(out_dir, canonical_hash(identity | {"spectra": True}), "spectrum")

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
        chosen = allocator.allocate(curves, self.budget.limit, **_options(self.config))
        return {
            curve.name: 0 if curve.ranks[point] == DENSE else int(curve.ranks[point])
            for curve, point in zip(curves, chosen, strict=True)
        }

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
    tail = projector_of(tensors, target).tail()
    if unit == "nats":
        return tail / 2
    total = float(tensors[f"{target.name}/total"])
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


def _options(config: ScoreConfig) -> dict[str, float]:
    return {"floor": config.floor} if config.allocate == "loss" else {}


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


def key(config: ScoreConfig, inputs: Inputs) -> Key:
    """Everything that bases and ranks depend on."""
    settings = config.model_dump(mode="json")
    method = METHODS[config.method]
    settings |= {"unit": method.unit}
    del settings["method"]
    return Key("score", VERSION, settings, {"calibration": inputs.calibration.id})


def check_names(config: ScoreConfig) -> None:
    """Refuse unknown names before any work.

    Raises
    ------
    InputError
        The method, allocator or storage is unknown.
    """
    METHODS[config.method]
    ALLOCATORS[config.allocate]
    if config.storage not in STORAGES:
        raise InputError(unknown("storage", config.storage, STORAGES))


def run(
    config: ScoreConfig, inputs: Inputs, out_dir: Path, reporter: Reporter | None = None, *, overwrite: bool = False
) -> Manifest:
    """Score: decompose what is not decomposed yet, then choose ranks.

    Parameters
    ----------
    config, inputs
        What to do on what.
    out_dir
        Directory for bases, ranks.json and the manifest.
    reporter
        Told about progress.
    overwrite
        Replace other ranks in `out_dir`; hand-edited ones are moved to ranks.json.bak.

    Raises
    ------
    LrcError
        Statistics are missing, the ratio is out of reach, or another result is in `out_dir`.
    """
    reporter = reporter or Silent()
    check_names(config)
    identity = key(config, inputs)
    if overwrite:
        _save_edited_ranks(out_dir)
    bases = Bases(config, inputs, out_dir)
    blocks = range(len(bases.resolved.blocks))
    found = committed_scores(out_dir, identity, overwrite=overwrite)
    if found is not None:
        return found
    statistics = BlockFiles(inputs.statistics, inputs.calibration.id)
    for block in blocks:
        if not bases.finished(block):
            bases.take(block, _means(statistics, block) if bases.method.needs_data else {})
        if ALLOCATORS[config.allocate].needs_spectrum and not bases.spectra.finished(block):
            bases.take_spectrum(block)
        reporter.advance("score", block + 1, len(blocks))
    curves = bases.curves()
    bases.budget.check(curves)
    chosen = ALLOCATORS[config.allocate].allocate(curves, bases.budget.limit, **_options(config))
    choices = {
        curve.name: Choice("dense", None)
        if curve.ranks[point] == DENSE
        else Choice(config.storage, int(curve.ranks[point]))
        for curve, point in zip(curves, chosen, strict=True)
    }
    write_ranks(out_dir / RANKS, bases.resolved.targets, choices)
    stored = sum(choices[target.name].stored(target.shape) for target in bases.resolved.targets)
    claimed = sum(target.elements for target in bases.resolved.targets)
    report = {
        "asked_ratio": config.ratio,
        "reached_ratio": bases.budget.reached(stored),
        "ratio_of": config.ratio_of,
        "denominator": bases.budget.denominator,
        "claimed_elements": claimed,
        "stored_elements": stored,
        "predicted_loss": float(sum(curve.loss[point] for curve, point in zip(curves, chosen, strict=True))),
        "unit": bases.method.unit,
        "bases": bases.files.id,
        "spectra": bases.spectra.id if ALLOCATORS[config.allocate].needs_spectrum else None,
    }
    outputs = [RANKS, *(bases.files.name(block) for block in blocks)]
    if ALLOCATORS[config.allocate].needs_spectrum:
        outputs += [bases.spectra.name(block) for block in blocks]
    return commit(out_dir, identity, outputs, report, environment(config.device))


def _means(statistics: BlockFiles, block: int) -> Mapping[str, Tensor]:
    if not statistics.path(block).exists():
        raise ArtifactError(
            f"{statistics.directory} has no statistics of block {block}, and no basis that was kept serves these "
            "options (`lrc compress` drops statistics, and keeps only the ranks that it needs). Repeat `lrc calibrate` "
            "with the same recipe, or `lrc compress` with --keep-statistics."
        )
    return statistics.read(block)


def committed_scores(out_dir: Path, identity: Key, *, overwrite: bool) -> Manifest | None:
    """As `manifest.committed`, but an overwritten result leaves its bases, and edited ranks are no damage."""
    if overwrite and (out_dir / "manifest.json").exists():
        with contextlib.suppress(ArtifactError):
            found = committed(out_dir, identity)
            if found is not None and set(altered(out_dir, found)) <= {RANKS}:
                return found
        _save_edited_ranks(out_dir)
        (out_dir / "manifest.json").unlink(missing_ok=True)
        return None
    return committed(out_dir, identity)


def _save_edited_ranks(out_dir: Path) -> None:
    """Move hand-edited ranks aside, so that new ones do not bury them."""
    ranks = out_dir / RANKS
    if not ranks.exists():
        return
    try:
        manifest = read_manifest(out_dir)
        edited = manifest is not None and manifest.outputs[RANKS]["sha256"] != sha256(ranks)
    except ArtifactError:
        edited = True  # perhaps
    if edited:
        shutil.move(ranks, out_dir / RANKS_BACKUP)
        (out_dir / "manifest.json").unlink(missing_ok=True)
