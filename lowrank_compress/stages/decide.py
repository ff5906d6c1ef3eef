"""Which plan is taken: first ones are tried on held-out text, and then those that are made of what that has shown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lowrank_compress.config import CalibrateConfig, ScoreConfig
from lowrank_compress.model.walk.batch import Batch
from lowrank_compress.resources.resources import Resources
from lowrank_compress.stages.choice import Plan, best, plans_of, scaled_plan, second_plan, tried
from lowrank_compress.stages.decompose import Bases
from lowrank_compress.stages.measured import measured_plan
from lowrank_compress.stages.reporting import Reporter
from lowrank_compress.stages.second import scales, second_bases


def decide(
    bases: Bases,
    held_out: Callable[[], list[Batch]] | None,
    again: CalibrateConfig | None,
    reporter: Reporter,
    resources: Resources,
) -> tuple[Plan, list[dict[str, Any]]]:
    """Choose among whole plans, and return what each of them came to on held-out text, where several were tried.

    Parameters
    ----------
    bases
        All decompositions.
    held_out
        Makes the text that plans are tried on; None where there is no such.
    again
        How the calibration is repeated for a second allocation, and where losses are measured.
    reporter, resources
        As of all stages.
    """
    config, workers, plans = bases.chooser.config, resources.workers, plans_of(bases)
    measures = bases.chooser.allocator.measures
    compared = held_out is not None and (len(plans) > 1 or config.second or measures)
    batches = held_out() if held_out is not None and compared else []
    found = workers.once(lambda: tried(bases, batches, plans)) if batches else []
    if batches:
        reporter.advance("choose", len(plans), len(plans))
    if batches and config.second and again is not None:
        plans.append(_second(config, again, best(_own(bases, plans), found), reporter, resources))
        found += workers.once(lambda: tried(bases, batches, plans[-1:]))
        if plans[-1].bases is not bases and best(plans, found) is not plans[-1]:
            workers.once(lambda: plans[-1].bases.files.remove(bases.chooser.subject.scopes))
    if measures and again is not None:
        first = best(_own(bases, plans), found)
        plan = measured_plan(first, again, reporter, resources=resources)
        if not batches:
            return plan, []
        plans.append(plan)
        found += workers.once(lambda: tried(bases, batches, plans[-1:]))
    return best(plans, found), found


def _own(bases: Bases, plans: Sequence[Plan]) -> list[Plan]:
    """Leave out those of the rival's scheme."""
    return [plan for plan in plans if plan.bases is not bases.rival]


def _second(config: ScoreConfig, again: CalibrateConfig, first: Plan, reporter: Reporter, resources: Resources) -> Plan:
    """Plan with the gradients at a first plan."""
    if config.second_by == "full":
        return second_plan(second_bases(first, again, reporter, resources=resources))
    alone = resources.alone(config.device)
    told = resources.workers.once(lambda: scales(first, again, reporter, resources=alone))
    return scaled_plan(first.bases, told)
