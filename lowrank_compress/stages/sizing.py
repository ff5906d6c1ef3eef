"""What a run will need, computed from shapes alone: the plan that `--dry-run` prints."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lowrank_compress.allocation.choice import Choice
from lowrank_compress.arch.targets import Resolved, Target
from lowrank_compress.calibration.capture import boundaries
from lowrank_compress.calibration.own import bytes_to_write
from lowrank_compress.calibration.statistics import enough_tokens
from lowrank_compress.evaluation.size import weight_bytes
from lowrank_compress.methods.groups import TargetGroup, needed, needs_data, price_of, statistics_bytes
from lowrank_compress.resources.resources import Resources
from lowrank_compress.stages.bytebudget import most_bytes, original_bytes
from lowrank_compress.stages.cachebudget import limit_of, most_stored, stock
from lowrank_compress.stages.maps import WRITERS
from lowrank_compress.stages.measured import TOKENS, cost, most_trials
from lowrank_compress.stages.plan import Plan
from lowrank_compress.stages.reach import uniform_choices
from lowrank_compress.stages.refiningexperts import sums_bytes
from lowrank_compress.stages.run import Run
from lowrank_compress.stages.samples import has_own

SINGLE = 4
COMPETING = 4


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


def dry_run(plan: Plan, run: Run, resources: Resources = Resources()) -> dict[str, Any]:
    """Budget, ranks that need no data, memory and disk of a run; reads headers only and writes nothing.

    Raises
    ------
    InputError
        The ratio is out of reach.
    """
    targets, budget = plan.subject.resolved.targets, plan.chooser.budget
    need = estimate(plan, resources)
    in_bytes = plan.score.bytes is not None  # what ranks there are is not known before
    choices = {} if in_bytes else uniform_choices(plan.score, budget, plan.subject.candidates)
    return {
        "recipe": plan.resolved().model_dump(mode="json"),
        "run": str(run.path),
        "budget": {
            "ratio": plan.score.ratio,
            "ratio_of": plan.score.ratio_of,
            "denominator": budget.denominator,
            "claimed_elements": sum(target.elements for target in targets),
            "largest_stored": budget.limit,
            "claimed_bytes": sum(weight_bytes(plan.subject.model, target) for target in targets),
            "uniform_bytes": _uniform_bytes(plan, choices),
        },
        **_cache(plan),
        **_bytes(plan),
        **_measurements(plan),
        "uniform_ranks": {name: None if c.is_dense else c.parameters[0] for name, c in choices.items()},
        "ranks_need_data": plan.score.allocate != "uniform",
        "memory": need.memory,
        "disk": need.disk,
        "notes": list(plan.notes),
    }


def _cache(plan: Plan) -> dict[str, Any]:
    """The budget of the cache, if it has one."""
    config, groups = plan.score, plan.chooser.cache
    if config.kv_ratio is None:
        return {}
    most = limit_of(config, plan.subject.cache)
    window = config.scheme.kv_window
    return {"cache": {"ratio": config.kv_ratio, "dense": stock(groups), "largest_kept": most, "window": window}}


def _bytes(plan: Plan) -> dict[str, Any]:
    """The budget in bytes, if there is one."""
    budget = plan.score.bytes
    if budget is None:
        return {}
    sizes = {"original": original_bytes(plan.subject), "largest_stored": most_bytes(budget, plan.subject)}
    return {"bytes": {"share": budget.share, **sizes}}


def _measurements(plan: Plan) -> dict[str, Any]:
    """What measuring losses will cost at most, if the allocator does."""
    if not plan.chooser.allocator.measures:
        return {}
    trials = most_trials(plan.chooser)
    passes = cost(trials, len(plan.subject.resolved.blocks))
    tokens = min(plan.recipe.samples * plan.calibrate.seq_len, TOKENS)
    return {"measured": {"changes": sum(trials.values()), "passes": passes, "tokens": tokens}}


def _uniform_bytes(plan: Plan, choices: Mapping[str, Choice]) -> int:
    """Bytes that are stored for the claimed weights at uniform ranks; with "auto" storage, the most that it may be."""
    itemsize = getattr(torch, plan.factorize.dtype).itemsize
    claimed = sum(target.elements for target in plan.subject.resolved.targets)
    kept = claimed - sum(part.dense for part in plan.subject.candidates)
    kept += most_stored(plan.score, plan.subject.cache)
    return kept * itemsize + sum(
        price_of(group, choices[group.name]).bytes(itemsize) for group in plan.chooser.groups if group.name in choices
    )


def estimate(plan: Plan, resources: Resources) -> Need:
    """Estimate memory and disk from shapes."""
    chooser, subject = plan.chooser, plan.subject
    resident, spilled = _resident(plan, chooser.groups, resources)
    stays = sum(p.numel() for p in subject.model.model.parameters()) - sum(part.dense for part in subject.candidates)
    stays += most_stored(plan.score, subject.cache)
    kept = chooser.budget.limit if plan.score.bytes is None else sum(part.dense for part in subject.candidates)
    written = (stays + kept) * getattr(torch, plan.factorize.dtype).itemsize
    # Finished blocks, and then the checkpoint that is put together from them.
    disk = {"bases": _bases(plan).total() * SINGLE, "compressed checkpoint": 2 * written}
    if plan.score.bytes is not None:  # those that compete lie there at a time, before and after rounding
        disk["candidates"] = math.ceil(COMPETING * written * (1 + plan.score.bytes.share))
    if plan.refine is not None:  # once more as it was, and what errors cost
        costs = sum(subject.model.model.config.hidden_size**2 for _ in subject.resolved.targets)
        disk |= {"unrefined checkpoint": written, "gradients": costs * SINGLE}
    return Need(resident, disk | spilled)


def _bases(plan: Plan) -> Counter[int]:
    """How many elements of decompositions are kept of each block."""
    found, chooser = Counter[int](), plan.chooser
    for made in [chooser, *([] if chooser.rival is None else [chooser.rival])]:
        for group in made.groups:
            found[group.block] += group.basis_elements(made.keep[group.name])
    return found


def _refining_bytes(resolved: Resolved, resources: Resources) -> int:
    """Bytes of the moments of a matrix's inputs and targets, in halves and together, and of what is solved.

    Beside one expert lie the sums of others.
    """

    def of(target: Target) -> int:
        rows, columns = target.shape
        return torch.float64.itemsize * (5 * columns**2 + 6 * rows * columns)

    longest = max((max(target.shape) for target in resolved.targets if target.expert is not None), default=0)
    experts = max(target.experts for target in resolved.targets)
    together = max(sums_bytes(longest), min(resources.for_sums, experts * sums_bytes(longest)))
    return max(map(of, resolved.targets)) + together


def _activation_bytes(plan: Plan) -> int:
    """Bytes of what enters and leaves the matrices of a block in a micro-batch; hooks have it beside the graph.

    Of routed experts a token sees some only.
    """
    resolved, widths = plan.subject.resolved, defaultdict[int, float](float)
    for target in resolved.targets:
        seen = 1.0 if target.expert is None or not resolved.router else resolved.router.chosen / target.experts
        widths[target.block] += sum(target.shape) * seen
    tokens = min(plan.calibrate.micro_batch, plan.recipe.samples) * plan.calibrate.seq_len
    return math.ceil(2 * tokens * max(widths.values()) * SINGLE)


def _costs_bytes(resolved: Resolved) -> int:
    """Bytes of what the gradients of a block say that errors cost, where refining takes that anew (`stages.maps`)."""
    found = Counter[int]()
    for target in resolved.targets:
        rows, columns = target.shape
        writes = target.reads in WRITERS or target.role == "down"
        found[target.block] += (rows if writes else min(rows, columns)) ** 2
    return torch.float64.itemsize * max(found.values())


def beyond(plan: Plan, resources: Resources) -> str | None:
    """Say that a run will take more memory than it is to, and what of it, before it begins; None where it will not."""
    resident, _ = _resident(plan, plan.chooser.groups, resources)
    need, budget = sum(resident.values()), resources.budget
    if need <= budget:
        return None
    largest = max(resident, key=resident.__getitem__)
    whose = "there is" if resources.memory is None else "--memory-budget allows"
    text = (
        f"The run will take about {need / 1e9:.2g} GB of memory beside the program itself, more than {whose} "
        f"({budget / 1e9:.2g} GB); most of it for {largest} ({resident[largest] / 1e9:.2g} GB)."
    )
    if _whole_blocks(plan) and any(_lent(plan, resources, whole=False)):
        text += (
            " Weights are stored in few bits with all experts of a block in memory; without --bytes, one at a time is."
        )
    return text


def _whole_blocks(plan: Plan) -> bool:
    """Whether some step has all experts of a block in memory: what stores weights in few bits does."""
    return plan.score.bytes is not None


def _lent(plan: Plan, resources: Resources, whole: bool) -> list[int]:
    """Of each block, the elements of experts that are not in memory while one of them is run (`Skeleton`)."""
    found = []
    for index in range(len(plan.subject.resolved.blocks)):
        own = [target for target in plan.subject.resolved.of_block(index) if target.expert is not None]
        elements = sum(target.elements for target in own)
        stays = whole or elements * SINGLE <= resources.for_experts
        found.append(0 if stays else elements - elements // own[0].experts)
    return found


def roomy(plan: Plan, resources: Resources) -> bool:
    """Whether a run needs so much less memory than there is that what is freed may be kept.

    Not where experts are in memory in turn, as what is freed of one would lie beside the next.
    """
    resident, spilled = _resident(plan, plan.subject.groups, resources)
    in_turn = any(_lent(plan, resources, _whole_blocks(plan)))
    return not spilled and not in_turn and resources.may_keep_freed(sum(resident.values()))


def _resident(plan: Plan, groups: Sequence[TargetGroup], resources: Resources) -> tuple[dict[str, int], dict[str, int]]:
    """What a run has in memory at once, name -> bytes, and what of it goes to disk instead."""
    model, resolved = plan.subject.model.model, plan.subject.resolved
    wanted, resources = needed(groups), resources.on(plan.device)
    sizes = [sum(p.numel() for p in model.get_submodule(path).parameters()) for path in resolved.blocks]
    outside = sum(p.numel() for p in model.parameters()) - sum(sizes)
    tokens = plan.recipe.samples * plan.calibrate.seq_len if needs_data(groups) else 0
    copies = boundaries(len(resolved.blocks), wanted)
    states = {"hidden states": tokens * model.config.hidden_size * SINGLE * copies}
    spills = states["hidden states"] > resources.for_states
    blocks = defaultdict[int, list[TargetGroup]](list)
    for group in groups:
        blocks[group.block].append(group)
    largest = max(blocks.values(), key=statistics_bytes)  # others may have no experts, or be dense
    at_once = resources.blocks_at_once(statistics_bytes(largest))
    beside = [group.working_bytes() for group in largest if group.parallel]
    short = tokens < enough_tokens(max(max(target.shape) for group in largest for target in group.targets))
    halves = 2 if short else 1  # of the calibration set, each with sums of its own
    statistics = at_once * statistics_bytes(largest) * (halves if plan.score.held_out else 1)
    lent = _lent(plan, resources, _whole_blocks(plan))
    resident = {
        "outside the blocks": outside * SINGLE,
        "one block": max(size - lent for size, lent in zip(sizes, lent, strict=True)) * SINGLE,
        "activations": _activation_bytes(plan) if tokens else 0,
        "statistics": max(statistics, 0 if plan.refine is None else halves * _costs_bytes(resolved)),
        "bases": at_once * max(_bases(plan).values(), default=0) * SINGLE,
        "decompositions": max(
            resources.items_at_once(beside) * max(beside, default=0),
            *(group.working_bytes() for group in largest),
            0 if plan.refine is None else _refining_bytes(resolved, resources),
        ),
    }
    resident |= {} if spills else states
    if tokens and has_own(plan.calibrate):
        whole = bytes_to_write(plan.checkpoint, plan.calibrate.seq_len) - sum(resident.values())
        resident |= {"the whole model, which writes": max(0, whole)}  # before all else, in the same place
    return resident, states if spills else {}
