"""The second allocation: once a plan is there, what it costs to remove more or less is asked at its result.

Predicted losses are of second order at the dense model, where the loss is flat; at a result that has lost much, it is
not. So gradients are taken there, too (`calibration.again`), and decompositions, curves and ranks are made anew from
both. Once: what is learned at the second result is not better than at the first. Nothing is written for it but bases.

Most of what is learned is how much each matrix matters, not in which directions: where decompositions cost much, the
losses are only scaled, by (1 + tr F₁ / tr F) / 2, which a few tokens tell.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lowrank_compress.artifacts.documents import canonical_hash
from lowrank_compress.calibration.again import Again, Growth
from lowrank_compress.calibration.capture import capture
from lowrank_compress.config import CalibrateConfig
from lowrank_compress.methods.groups import TargetGroup, needed
from lowrank_compress.methods.scale import decisive
from lowrank_compress.resources.resources import Resources
from lowrank_compress.stages.choice import Plan, edited
from lowrank_compress.stages.choose import Chooser
from lowrank_compress.stages.decompose import Bases
from lowrank_compress.stages.reporting import Reporter, in_parts
from lowrank_compress.stages.samples import calibration_batches, few_tokens, with_drawn

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
        batches = calibration_batches(config, subject.checkpoint, subject.model.task)
        dense = bases.dense()
        captured = capture(
            dense,
            with_drawn(batches, config.drawn, subject.checkpoint, subject.model.task),
            needed(subject.groups),
            skip=lambda block: block not in missing,
            clip=config.clip,
            advance=lambda step, done, total: reporter.advance(f"{step} again", done, total),
            spill_to=directory,
            resources=resources,
            halves=config.held_out,
            again=Again(edited(plan, dense), _narrowed(plan), config.seed),
        )
        for done, part in in_parts(captured, bases.at_once):
            bases.take({statistics.block: statistics.means for statistics in part})
            reporter.advance("decompose again", done, len(resources.workers.share(missing)))
        bases.flush()
    resources.workers.once(lambda: None)  # the files of all are there
    return bases


def scales(plan: Plan, config: CalibrateConfig, reporter: Reporter, *, resources: Resources) -> dict[str, float]:
    """Find what to multiply the predicted losses of each group with: (1 + tr F₁ / tr F) / 2.

    Parameters
    ----------
    plan, config, reporter
        As of :func:`second_bases`; a few windows of the calibration set are looked at.
    resources
        What this process may use.

    Raises
    ------
    LrcError
        The text is gone, or a gradient is not finite.
    """
    subject = plan.bases.chooser.subject
    count = max(1, few_tokens(subject.checkpoint) // config.seq_len)
    few = config.model_copy(update={"samples": min(count, config.samples)})
    dense = plan.bases.dense()
    captured = capture(
        dense,
        calibration_batches(few, subject.checkpoint, subject.model.task),
        {target.name: frozenset({"out_square"}) for group in subject.groups for target in group.targets},
        skip=lambda block: False,
        clip=config.clip,
        advance=lambda step, done, total: reporter.advance(f"{step} again", done, total),
        spill_to=plan.bases.files.directory,
        resources=resources,
        again=Growth(edited(plan, dense), _narrowed(plan), config.seed),
    )
    traces = {name: found for statistics in captured for name, found in statistics.means.items()}
    return {group.name: _scale(group, traces) for group in subject.groups}


def _scale(group: TargetGroup, traces: Mapping[str, Tensor]) -> float:
    """Of those matrices of a group whose gradients its losses are made of."""
    before, after = torch.stack([traces[target.name] for target in decisive(group)]).sum(0).tolist()
    return (1 + after / before) / 2 if before > 0 else 1.0


def _narrowed(plan: Plan) -> frozenset[str]:
    """Name the matrices that lose outputs altogether."""
    return frozenset(
        target.name
        for group in plan.groups
        if len(group.targets) > 1 and not group.cached and not plan.choices[group.name].is_dense
        for target in group.targets
        if target.role not in ("o", "down")  # these lose inputs
    )
