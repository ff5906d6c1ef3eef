"""Stage 2: decompose each matrix in the method's metric, and choose ranks under the budget.

Writes a basis file a block (kept up to the largest rank that can pay) and ranks.json, which people may edit.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowrank_compress.allocation.budget import Budget
from lowrank_compress.allocation.curve import DENSE, Curve, linear_curve
from lowrank_compress.allocation.storage import STORAGES, cost, largest_rank
from lowrank_compress.allocation.table import ALLOCATORS
from lowrank_compress.arch.resolve import Target
from lowrank_compress.artifacts.files import read_json, sha256, write_text
from lowrank_compress.artifacts.manifest import Key, Manifest, canonical_hash, commit, committed, read_manifest
from lowrank_compress.artifacts.tensors import BlockFiles
from lowrank_compress.config import ScoreConfig
from lowrank_compress.errors import ArtifactError, InputError
from lowrank_compress.linalg.eigen import eigh
from lowrank_compress.linalg.weighted import Projector
from lowrank_compress.methods.linear import Damping, decompose_target, sensitivities
from lowrank_compress.methods.table import METHODS
from lowrank_compress.model import weights
from lowrank_compress.model.checkpoint import Checkpoint
from lowrank_compress.model.skeleton import meta_model
from lowrank_compress.registry import unknown
from lowrank_compress.stages.common import Reporter, Silent, environment

VERSION = 1
RANKS = "ranks.json"
RANKS_BACKUP = "ranks.json.bak"


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


@dataclass(frozen=True)
class Choice:
    """How one matrix is to be stored.

    Attributes
    ----------
    format
        "pair", "pivot", "auto" (the better of both at the count of the cheaper) or "dense".
    rank
        r; None for dense.
    """

    format: str
    rank: int | None

    def stored(self, shape: tuple[int, int]) -> int:
        """Stored elements."""
        return shape[0] * shape[1] if self.rank is None else int(cost(self.format, shape, self.rank))


class Bases:
    """The decompositions of a run, block by block; as a `calibrate.Sink` it makes each from the statistics at once."""

    def __init__(self, config: ScoreConfig, inputs: Inputs, out_dir: Path) -> None:
        self.config = config
        self.checkpoint = inputs.checkpoint
        self.method = METHODS[config.method]
        self.device = torch.device(config.device)
        self.damping = Damping(config.damping_fisher, config.damping_gram, config.alpha)
        model, self.resolved = meta_model(inputs.checkpoint)
        self._prefix = model.base_model_prefix
        self.budget = budget_of(config, inputs.checkpoint)
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
        if allocator.needs_loss or allocator.needs_spectrum:
            return paying
        curves = [
            linear_curve(target.name, target.shape, np.zeros(paying[target.name] + 1), _cost(storage, target.shape))
            for target in targets
        ]
        self.budget.check(curves)
        chosen = allocator.allocate(curves, self.budget.limit, **_options(self.config))
        return {
            curve.name: 0 if curve.ranks[point] == DENSE else int(curve.ranks[point])
            for curve, point in zip(curves, chosen, strict=True)
        }

    def weight(self, target: Target) -> Tensor:
        """W of a target, (out, in), as stored, on the computing device."""
        name = f"{target.module}.weight"
        stored = self.checkpoint.name_on_disk(name, self._prefix)
        if stored is None:
            raise ArtifactError(f"{self.checkpoint.path} has no tensor {name}; it is not the checkpoint of this run.")
        return weights.read(self.checkpoint.read(stored), target).to(self.device)

    def finished(self, block: int) -> bool:
        """Whether the block is decomposed."""
        return self.files.finished(block)

    def take(self, block: int, means: Mapping[str, Tensor]) -> None:
        """Decompose a block from its complete statistics."""
        tensors: dict[str, Tensor] = {}
        for target in self.resolved.of_block(block):
            projector = decompose_target(
                self.method, target, self.weight(target), means, self.damping, max(self.keep[target.name], 1)
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
            weight = self.weight(target).double()
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


def budget_of(config: ScoreConfig, checkpoint: Checkpoint) -> Budget:
    """The budget that a ratio means for a checkpoint.

    Raises
    ------
    InputError
        The ratio is not between 0 and 1.
    """
    model, resolved = meta_model(checkpoint)
    claimed = sum(target.elements for target in resolved.targets)
    whole = sum(parameter.numel() for parameter in model.parameters())
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
            bases.take(block, statistics.read(block) if bases.method.needs_data else {})
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


def committed_scores(out_dir: Path, identity: Key, *, overwrite: bool) -> Manifest | None:
    """As `manifest.committed`, but an overwritten result leaves its bases: the same ones are often wanted again."""
    if overwrite and (out_dir / "manifest.json").exists():
        try:
            return committed(out_dir, identity)
        except ArtifactError:
            (out_dir / "manifest.json").unlink()
            return None
    return committed(out_dir, identity)


def _save_edited_ranks(out_dir: Path) -> None:
    """Move hand-edited ranks aside, so that new ones do not bury them."""
    ranks = out_dir / RANKS
    if not ranks.exists():
        return
    try:
        manifest = read_manifest(out_dir)
    except ArtifactError:
        manifest = None
    if manifest is None or manifest.outputs.get(RANKS, {}).get("sha256") != sha256(ranks):
        shutil.move(ranks, out_dir / RANKS_BACKUP)
        (out_dir / "manifest.json").unlink(missing_ok=True)


def write_ranks(path: Path, targets: Sequence[Target], choices: Mapping[str, Choice]) -> None:
    """Write ranks.json: one matrix a line, for people to read and edit."""
    lines = [
        f"    {json.dumps(target.name)}: "
        + json.dumps({"shape": list(target.shape), "format": choice.format, "rank": choice.rank})
        for target in targets
        for choice in [choices[target.name]]
    ]
    write_text(path, '{\n  "schema": 1,\n  "matrices": {\n' + ",\n".join(lines) + "\n  }\n}\n")


def read_ranks(path: Path, targets: Sequence[Target]) -> dict[str, Choice]:
    """Read ranks.json and check that it fits a model.

    Raises
    ------
    ArtifactError
        It does not parse, names other matrices, or a rank or format does not fit; the message says which.
    """
    found = read_json(path)
    matrices: dict[str, Any] = found.get("matrices", {})
    missing = [target.name for target in targets if target.name not in matrices]
    extra = sorted(set(matrices) - {target.name for target in targets})
    if missing or extra:
        raise ArtifactError(
            f"{path} does not fit the model: "
            + (f"it lacks {missing[0]}" if missing else f"it names {extra[0]}, which the model does not have")
            + ". Correct it, or repeat `lrc score` with --overwrite."
        )
    choices = {}
    for target in targets:
        entry = matrices[target.name]
        form, rank = entry.get("format"), entry.get("rank")
        if form == "dense" and rank is None:
            choices[target.name] = Choice("dense", None)
            continue
        if form not in STORAGES or not isinstance(rank, int) or not 1 <= rank < min(target.shape):
            raise ArtifactError(
                f"{path}: {target.name} has format {form!r} and rank {rank!r}; expected one of {', '.join(STORAGES)} with a "
                f'rank from 1 to {min(target.shape) - 1}, or "dense" with rank null.'
            )
        choices[target.name] = Choice(form, rank)
    return choices
