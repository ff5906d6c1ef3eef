"""The second allocation: once a plan is there, what it costs to remove more or less is asked at its result.

Predicted losses are of second order at the dense model, where the loss is flat; at a result that has lost much, it is
not. So gradients are taken there, too (`calibration.again`), and decompositions, curves and ranks are made anew from
both. Once: what is learned at the second result is not better than at the first. Nothing is written for it but bases.
"""

from __future__ import annotations

import torch

from lowrank_compress.artifacts.documents import canonical_hash
from lowrank_compress.calibration.again import Again
from lowrank_compress.calibration.capture import capture
from lowrank_compress.config import CalibrateConfig
from lowrank_compress.methods.groups import needed
from lowrank_compress.model.skeleton import Skeleton
from lowrank_compress.resources.resources import Resources
from lowrank_compress.stages.choice import Plan, edited
from lowrank_compress.stages.choose import Chooser
from lowrank_compress.stages.decompose import Bases
from lowrank_compress.stages.reporting import Reporter, in_parts
from lowrank_compress.stages.samples import calibration_batches, with_drawn

VERSION = 1


def second_bases(plan: Plan, config: CalibrateConfig, reporter: Reporter, *, resources: Resources) -> Bases:
    """Decompose all groups once more, with the gradients at a plan's result counted in.

    Files of blocks that are there already are taken as they are.

    Parameters
    ----------
    plan
        The first plan.
    config
        Of the calibration, which is repeated beside that of the plan's result.
    reporter
        Told about progress.
    resources
        What this process may use, and those that do this together with it, all called with the same.

    Raises
    ------
    LrcError
        The text is gone, or a gradient is not finite.
    """
    chooser = Chooser(plan.bases.chooser.config.model_copy(update={"rival": None}), plan.bases.chooser.subject)
    subject, directory = chooser.subject, plan.bases.files.directory
    choices = {name: [choice.format, *choice.parameters] for name, choice in plan.choices.items()}
    looked_at = {"bases": plan.bases.files.id, "choices": choices, "seed": config.seed, "version": VERSION}
    bases = Bases(chooser, canonical_hash(looked_at), directory, resources=resources, prefix="second")
    missing = resources.workers.once(lambda: [block for block in subject.scopes if not bases.finished(block)])
    if missing:
        narrowed = {
            target.name
            for group in plan.groups
            if len(group.targets) > 1 and not plan.choices[group.name].is_dense
            for target in group.targets
            if target.role not in ("o", "down")  # these lose inputs
        }
        batches = calibration_batches(config, subject.checkpoint, subject.model.task)
        captured = capture(
            Skeleton(subject.checkpoint, bases.device, torch.float32),
            with_drawn(batches, config.drawn, subject.checkpoint, subject.model.task),
            needed(subject.groups),
            skip=lambda block: block not in missing,
            clip=config.clip,
            advance=lambda step, done, total: reporter.advance(f"{step} again", done, total),
            spill_to=directory,
            resources=resources,
            halves=config.held_out,
            again=Again(edited(plan), frozenset(narrowed), config.seed),
        )
        for done, part in in_parts(captured, bases.at_once):
            bases.take({statistics.block: statistics.means for statistics in part})
            reporter.advance("decompose again", done, len(resources.workers.share(missing)))
        bases.flush()
    resources.workers.once(lambda: None)  # the files of all are there
    return bases
