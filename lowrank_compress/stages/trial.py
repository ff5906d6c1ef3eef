"""What plans in bytes come to: each is stored as it would be in the end, and held against the dense model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lowrank_compress.artifacts.directories import remove_listed
from lowrank_compress.artifacts.manifest import listed
from lowrank_compress.config import FactorizeConfig
from lowrank_compress.evaluation.divergence import divergences
from lowrank_compress.model.checkpoint import Checkpoint
from lowrank_compress.model.skeleton import Skeleton
from lowrank_compress.model.walk.batch import Batch
from lowrank_compress.resources.resources import Resources
from lowrank_compress.stages import factorize, quantize
from lowrank_compress.stages.choice import Plan, drawn_at_random
from lowrank_compress.stages.origin import Heard
from lowrank_compress.stages.quantizeconfig import QuantizeConfig
from lowrank_compress.stages.reporting import Reporter, Silent
from lowrank_compress.stages.stage import Given


@dataclass(frozen=True)
class Storing:
    """How a plan becomes a checkpoint in few bits.

    Attributes
    ----------
    factorize, quantize
        Configs of the two stages.
    heard
        What the model was calibrated on.
    work
        Where candidates lie meanwhile.
    """

    factorize: FactorizeConfig
    quantize: QuantizeConfig
    heard: Heard
    work: Path


class _Quiet(Silent):
    """Says nothing: of what is taken it is said again."""

    def warn(self, text: str) -> None:
        """Do nothing."""


def tried_stored(
    plans: Sequence[Plan],
    storing: Storing,
    commit: Callable[[Plan, Path], object],
    batches: Sequence[Batch],
    reporter: Reporter,
    resources: Resources,
) -> list[dict[str, Any]]:
    """Store plans one after another, and return what each came to, for the report.

    What an interrupted trial has finished is taken as it is.

    Parameters
    ----------
    plans
        All of one model.
    storing
        How.
    commit
        Writes the scores of a plan to a directory.
    batches
        Windows of text that no fit has seen, or examples for a classifier.
    reporter
        Told about progress.
    resources
        What may be used; by this process alone.
    """
    made = []
    quiet = _Quiet()
    for number, plan in enumerate(plans):
        made.append(_stored(plan, storing, storing.work / f"plan-{number}", commit, quiet, resources))
        reporter.advance("try plans", number + 1, len(plans))
    device = torch.device(storing.quantize.device)
    subject = plans[0].bases.chooser.subject
    models = [Skeleton(each, device, torch.float32) for each in (subject.checkpoint, *made)]
    found = [divergences(models, batches)]
    far = drawn_at_random(batches, models[0].model.config.vocab_size) if models[0].task == "lm" else []
    if far:
        found.append(divergences(models, far))
    return [
        {"plan": plan.name, "divergence": values[0], "at_random": values[1] if far else None}
        for plan, *values in zip(plans, *found, strict=True)
    ]


def _stored(
    plan: Plan,
    storing: Storing,
    place: Path,
    commit: Callable[[Plan, Path], object],
    reporter: Reporter,
    resources: Resources,
) -> Checkpoint:
    scores, factors, packed = (place / name for name in ("scores", "factors", "packed"))
    commit(plan, scores)
    inputs = factorize.Inputs(plan.bases.chooser.subject.model, scores, storing.heard)
    made = factorize.run(storing.factorize, inputs, factors, reporter, resources=resources, overwrite=True)
    given = Given(Checkpoint(factors), made.report)
    quantize.run(storing.quantize, given, packed, reporter, resources=resources, overwrite=True)
    return Checkpoint(packed)


def clear(storing: Storing, count: int) -> None:
    """Remove the candidates, of which there were so many."""
    for number in range(count):
        for name in ("scores", "factors", "packed"):
            place = storing.work / f"plan-{number}" / name
            if place.exists():
                remove_listed(place, listed(place))
