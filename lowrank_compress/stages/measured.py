"""Losses that are measured: what it costs, at a plan, to store more or less of each of its units.

A predicted loss is of second order and of one group at a time, at the dense model. Here each unit of a plan is put, one
after the other, to a few stored shares and to dense, all else as the plan has it, and the divergence from the dense
model is taken on windows of the calibration set. The predicted curves of the unit's groups are corrected by that
(`allocation.measured`), and points are chosen once more.

A unit is a group; in large models, where each measurement takes long, all groups of one part of a block: queries and
keys, values and output, the MLP, its experts. Nothing is decomposed anew. A finished block's measurements are kept, and
found again after any interruption.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowrank_compress.allocation.curve import Curve
from lowrank_compress.allocation.measured import SHARES, corrected, correction, point_at
from lowrank_compress.artifacts.documents import canonical_hash
from lowrank_compress.artifacts.tensors import BlockFiles
from lowrank_compress.calibration.windows import batches_hash
from lowrank_compress.config import CalibrateConfig
from lowrank_compress.evaluation.divergence import divergences_at_the_end
from lowrank_compress.methods.groups import TargetGroup
from lowrank_compress.model.walk.batch import Batch
from lowrank_compress.model.walk.segments import boundary_bytes
from lowrank_compress.model.walk.states import StateStore
from lowrank_compress.model.walk.walk import Walk
from lowrank_compress.resources.resources import Resources
from lowrank_compress.stages.choice import Plan, in_place_of, planned, replacements
from lowrank_compress.stages.choose import Chooser
from lowrank_compress.stages.reporting import Reporter
from lowrank_compress.stages.samples import calibration_batches

VERSION = 1
NAME = "measured losses"
# Of the calibration set, for one measurement; with a fifth of them ranks fit these windows and no others.
TOKENS = 8192
DENSE = 1.0


@dataclass(frozen=True)
class Trial:
    """A plan in which the groups of one unit are at other points; the share is `DENSE` where they stay as they are."""

    unit: str
    share: float
    plan: Plan


def measured_plan(plan: Plan, config: CalibrateConfig, reporter: Reporter, *, resources: Resources) -> Plan:
    """Choose points once more, by curves that are corrected by what was measured at a plan.

    Parameters
    ----------
    plan
        Where it is measured. Its groups are those of the new plan.
    config
        Of the calibration, whose first windows it is measured on.
    reporter
        Told what it costs before it begins, and of progress.
    resources
        What this process may use, and those that do this together with it, all called with the same: each measures
        some of the blocks.

    Raises
    ------
    LrcError
        The text is gone.
    """
    bases, workers = plan.bases, resources.workers
    chooser, subject = bases.chooser, bases.chooser.subject
    curves = bases.curves()
    few = config.model_copy(update={"samples": min(config.samples, -(-TOKENS // config.seq_len))})
    batches = calibration_batches(few, subject.checkpoint, subject.model.task)
    trials = {block: trials_of(plan, curves, block) for block in range(len(subject.resolved.blocks))}
    choices = {name: [choice.format, *choice.parameters] for name, choice in plan.choices.items()}
    looked_at = {"bases": bases.files.id, "choices": choices, "text": batches_hash(batches), "version": VERSION}
    files = BlockFiles(bases.files.directory, canonical_hash(looked_at), "measured")
    missing = workers.once(lambda: [block for block in trials if trials[block] and not files.finished(block)])
    if missing:
        seen = sum(batch.tokens for batch in batches)
        passes = cost({block: len(trials[block]) for block in missing}, len(trials))
        reporter.warn(
            f"Losses are measured by running the model {passes:.0f} times over {seen} tokens: "
            f"{sum(len(trials[block]) for block in missing)} changes of {len(missing)} blocks"
            + (f". {TOKENS} tokens are better: pass more --samples, or longer ones." if seen < TOKENS else ".")
        )
    own = workers.share(missing)
    for done, block in enumerate(own, start=1):
        files.write(block, _measured(plan, trials[block], batches, resources))
        reporter.advance("measure", done, len(own))
    workers.once(lambda: None)  # the files of all are there
    better = dict(curves)
    for block in (block for block in trials if trials[block]):
        better |= _corrected(plan, curves, trials[block], files.read(block))
    found = planned(NAME, bases, better, plan.groups[: len(plan.groups) - len(chooser.cache)], chooser.allocate)
    workers.once(lambda: files.remove(trials))
    return found


def cost(trials: Mapping[int, int], blocks: int) -> float:
    """How many times the whole model is run, for so many trials of each of some blocks.

    For each block the dense model is run, the plan up to that block, and every trial from it on.
    """
    return sum(1 + (block + count * (blocks - block)) / blocks for block, count in trials.items())


def most_trials(chooser: Chooser) -> dict[int, int]:
    """How many trials there may be of each block, whichever candidates a plan takes."""
    units: dict[int, set[str]] = {}
    for part in chooser.subject.candidates:
        most = max(part.each, key=len)
        units.setdefault(most[0].block, set()).update(_unit(chooser, group) for group in most)
    return {block: len(names) * (len(SHARES) + 1) for block, names in units.items()}


def _unit(chooser: Chooser, group: TargetGroup) -> str:
    return group.name if chooser.small else f"{group.block}/{group.targets[0].group}"


def trials_of(plan: Plan, curves: Mapping[str, Curve], block: int) -> list[Trial]:
    """Return all trials of a block: each unit at each share, and dense."""
    units: dict[str, list[TargetGroup]] = {}
    for group in plan.groups:
        if group.block == block and not group.cached:
            units.setdefault(_unit(plan.bases.chooser, group), []).append(group)
    found = []
    for unit, groups in units.items():
        for share in (*SHARES, DENSE):
            own = {group.name: curves[group.name] for group in groups}
            choices = {name: curve.choice(point_at(curve, share)) for name, curve in own.items()}
            found.append(Trial(unit, share, replace(plan, choices=dict(plan.choices) | choices)))
    return found


def _measured(plan: Plan, trials: Sequence[Trial], batches: Sequence[Batch], resources: Resources) -> dict[str, Tensor]:
    """Divergence of each trial of one block, unit -> (shares + 1,) float64."""
    skeleton, device, directory = plan.bases.dense(), plan.bases.device, plan.bases.files.directory
    block = next(group.block for group in plan.groups if _unit(plan.bases.chooser, group) == trials[0].unit)
    # The dense model, and the trials, of which all are the plan before the block.
    spill = boundary_bytes(skeleton, batches) * (1 + len(trials)) > resources.on(str(device)).for_states
    walk = Walk([skeleton] * (1 + len(trials)), batches, store=StateStore(spill, directory))
    for step in walk.forwards():
        if step.index == block:
            for model, trial in enumerate(trials, start=1):
                with in_place_of(skeleton, replacements(trial.plan, block, device), directory):
                    step.advance(model)
            continue
        with in_place_of(skeleton, replacements(plan, step.index, device), directory):
            for number in range(len(batches)):
                if step.index < block:
                    _, leaving = step.run(number, 1)
                    for model in range(2, len(trials) + 1):
                        step.keep(number, leaving, model)
            for model in range(1, len(trials) + 1):
                step.advance(model)
    found: dict[str, list[float]] = {}
    for trial, divergence in zip(trials, divergences_at_the_end(walk), strict=True):
        found.setdefault(trial.unit, []).append(divergence)
    return {unit: torch.tensor(values, dtype=torch.float64) for unit, values in found.items()}


def _corrected(
    plan: Plan, curves: Mapping[str, Curve], trials: Sequence[Trial], found: Mapping[str, Tensor]
) -> dict[str, Curve]:
    """Correct the curves of a block's groups."""
    better: dict[str, Curve] = {}
    for unit in dict.fromkeys(trial.unit for trial in trials):
        *values, dense = found[unit].tolist()
        groups = [g.name for g in plan.groups if not g.cached and _unit(plan.bases.chooser, g) == unit]
        corrections: dict[str, dict[float, float]] = {name: {} for name in groups}
        for share, value in zip(SHARES, values, strict=True):
            points = {name: point_at(curves[name], share) for name in groups}
            factor = correction(value - dense, sum(float(curves[name].loss[points[name]]) for name in groups))
            for name, point in points.items():
                corrections[name][float(curves[name].stored[point] / curves[name].dense)] = factor
        better |= {name: corrected(curves[name], corrections[name]) for name in groups}
    return better
