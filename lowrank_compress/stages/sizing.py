"""What a run will need, computed from shapes alone: the plan that `--dry-run` prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lowrank_compress.calibration.capture import boundaries
from lowrank_compress.calibration.statistics import enough_tokens
from lowrank_compress.evaluation.size import weight_bytes
from lowrank_compress.methods.matrix_unit import MatrixUnit
from lowrank_compress.methods.sites import all_units, sites_of
from lowrank_compress.methods.units import Unit, needed, needs_data, ranking, statistics_bytes, stored_bytes
from lowrank_compress.model.blueprint import Blueprint, blueprint
from lowrank_compress.model.memory import free_memory
from lowrank_compress.stages.bases import Bases
from lowrank_compress.stages.plan import Plan
from lowrank_compress.stages.reach import uniform_ranks
from lowrank_compress.stages.run import Run
from lowrank_compress.stages.together import blocks_at_once, matrices_at_once, room

SINGLE = 4


@dataclass(frozen=True)
class Need:
    """Bytes a run needs.

    Attributes
    ----------
    memory
        Name -> bytes that are in memory at once.
    disk
        Name -> bytes on disk.
    """

    memory: dict[str, int]
    disk: dict[str, int]


def dry_run(plan: Plan, run: Run, memory: int | None = None) -> dict[str, Any]:
    """Budget, ranks that need no data, memory and disk of a run; reads headers only and writes nothing.

    `memory` are the bytes to get by with; None for what is free.

    Raises
    ------
    InputError
        The ratio is out of reach.
    """
    # Nothing is read or written there: which calibration the bases belong to does not matter, and no text is touched.
    bases = Bases(plan.score, plan.checkpoint, "", run.scores)
    targets = bases.resolved.targets
    need = estimate(plan, bases, memory)
    ranks = uniform_ranks(plan.score, bases.budget, bases.sites)
    return {
        "recipe": plan.resolved().model_dump(mode="json"),
        "run": str(run.path),
        "budget": {
            "ratio": plan.score.ratio,
            "ratio_of": plan.score.ratio_of,
            "denominator": bases.budget.denominator,
            "claimed_elements": sum(target.elements for target in targets),
            "largest_stored": bases.budget.limit,
            "claimed_bytes": sum(weight_bytes(bases.blueprint, target) for target in targets),
            "uniform_bytes": _uniform_bytes(plan, bases, ranks),
        },
        "uniform_ranks": ranks,
        "ranks_need_data": plan.score.allocate != "uniform",
        "memory": need.memory,
        "disk": need.disk,
    }


def _uniform_bytes(plan: Plan, bases: Bases, ranks: Mapping[str, int | None]) -> int:
    """Bytes that are stored for the claimed weights at uniform ranks; with "auto" storage, the most that it may be."""
    itemsize = getattr(torch, plan.dtype).itemsize
    kept = sum(target.elements for target in bases.resolved.targets) - sum(site.dense for site in bases.sites)
    return kept * itemsize + sum(
        stored_bytes(unit, ranking(unit, plan.score.storage), ranks[unit.name], itemsize)
        for unit in bases.units
        if unit.name in ranks
    )


def estimate(plan: Plan, bases: Bases, memory: int | None = None) -> Need:
    """Estimate memory and disk from shapes."""
    made = [bases, *([] if bases.rival is None else [bases.rival])]
    basis = sum(unit.basis_elements(found.keep[unit.name]) for found in made for unit in found.units)
    memory = free_memory() if memory is None else memory
    resident, spilled = _resident(plan, bases.blueprint, bases.units, memory)
    stays = sum(p.numel() for p in bases.blueprint.model.parameters()) - sum(site.dense for site in bases.sites)
    written = (stays + bases.budget.limit) * getattr(torch, plan.dtype).itemsize
    # Finished blocks, and then the checkpoint that is put together from them.
    disk = {"bases": basis * SINGLE, "compressed checkpoint": 2 * written}
    return Need(resident, disk | spilled)


def roomy(plan: Plan, memory: int | None, processes: int = 1) -> bool:
    """Whether a run needs so much less memory than there is that what is freed may be kept.

    `memory` are the bytes that a process is to get by with; None for its part of what is free.
    """
    whole = blueprint(plan.checkpoint)
    memory = free_memory() // processes if memory is None else memory
    resident, spilled = _resident(plan, whole, all_units(sites_of(whole.resolved, plan.score.scheme)), memory)
    return not spilled and 2 * sum(resident.values()) <= memory


def _resident(
    plan: Plan, whole: Blueprint, units: Sequence[Unit], memory: int
) -> tuple[dict[str, int], dict[str, int]]:
    """What a run has in memory at once, name -> bytes, and what of it goes to disk instead."""
    model, resolved = whole.model, whole.resolved
    wanted, device = needed(units), torch.device(plan.score.device)
    block = sum(p.numel() for p in model.get_submodule(resolved.blocks[0]).parameters())
    outside = sum(p.numel() for p in model.parameters()) - block * len(resolved.blocks)
    tokens = plan.recipe.samples * plan.seq_len if needs_data(units) else 0
    copies = boundaries(len(resolved.blocks), wanted)
    states = {"hidden states": tokens * model.config.hidden_size * SINGLE * copies}
    spills = states["hidden states"] > memory - room(memory)
    first = [unit for unit in units if unit.block == 0]
    matrices = [unit for unit in first if isinstance(unit, MatrixUnit)]
    few = plan.held_out and tokens < enough_tokens(max(max(target.shape) for unit in first for target in unit.targets))
    halves = 2 if few else 1  # of the calibration set, each with sums of its own
    resident = {
        "outside the blocks": outside * SINGLE,
        "one block": block * SINGLE,
        "statistics": halves * blocks_at_once(units, device, memory) * statistics_bytes(first),
        "decompositions": max(
            matrices_at_once(matrices, device, memory) * max((unit.working_bytes() for unit in matrices), default=0),
            *(unit.working_bytes() for unit in first),
        ),
    }
    return (resident, states) if spills else (resident | states, {})
