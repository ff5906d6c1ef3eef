"""What the stages of a recipe read in a run."""

from __future__ import annotations

from lowrank_compress.artifacts.manifest import Key, read_manifest
from lowrank_compress.config import CalibrationSet
from lowrank_compress.errors import CalibrationError
from lowrank_compress.methods.groups import needs_data
from lowrank_compress.methods.rounding import ROUNDINGS
from lowrank_compress.model.walk.batch import Batch
from lowrank_compress.stages import calibrate, factorize, score
from lowrank_compress.stages.origin import Heard
from lowrank_compress.stages.plan import Plan
from lowrank_compress.stages.quantizeconfig import QuantizeConfig
from lowrank_compress.stages.run import Run
from lowrank_compress.stages.samples import held_out_batches
from lowrank_compress.stages.trial import Storing


def inputs_of_calibrate(plan: Plan, run: Run) -> calibrate.Inputs:
    """What the calibrate stage reads: nothing of the run."""
    return calibrate.Inputs(plan.subject)


def inputs_of_score(plan: Plan, run: Run) -> score.Inputs:
    """What the score stage reads in this run."""

    def held_out() -> list[Batch]:
        return held_out_batches(plan.calibrate, plan.checkpoint, plan.subject.model.task)

    calibration = _calibration(plan, run)
    again = plan.calibrate if plan.score.second or plan.chooser.allocator.measures else None
    quantize, storing = quantize_of(plan), None
    if quantize is not None:
        storing = Storing(plan.factorize, quantize, _heard(plan), run.work / "trial")
    # Plans for a budget in bytes are tried whatever the method.
    tried = plan.score.held_out or storing is not None
    return score.Inputs(plan.subject, calibration, run.statistics, held_out if tried else None, again, storing)


def quantize_of(plan: Plan) -> QuantizeConfig | None:
    """How the result is stored in few bits, where the budget is in bytes; on the text of the calibration."""
    budget, rounding = plan.score.bytes, plan.recipe.rounding
    if budget is None or rounding is None:
        return None
    data = dict(CalibrationSet.of(plan.calibrate))
    if ROUNDINGS[rounding].needs == "nothing":
        data |= {"source": None, "text_column": None, "label_column": None}
    return QuantizeConfig(
        **data,
        rounding=rounding,
        bytes=budget.share,
        group=budget.group,
        residual_rank=plan.recipe.residual_rank,
        inside=plan.recipe.residual_rank > 0,
        clip=plan.recipe.clip,
        device=plan.device,
    )


def _calibration(plan: Plan, run: Run) -> Key:
    """The key of the calibration; where its text is gone, that of the one that was made, if all else is the same."""
    inputs = calibrate.Inputs(plan.subject)
    try:
        return calibrate.key(plan.calibrate, inputs)
    except CalibrationError:
        made = read_manifest(run.statistics)
        text = None if made is None else made.key.inputs.get("text")
        if made is None or text is None or calibrate.key(plan.calibrate, inputs, text) != made.key:
            raise
        return made.key


def inputs_of_factorize(plan: Plan, run: Run) -> factorize.Inputs:
    """What the factorize stage reads in this run."""
    return factorize.Inputs(plan.subject.model, run.scores, _heard(plan))


def _heard(plan: Plan) -> Heard:
    """Say what the statistics are of, where there are any."""
    return Heard.of(plan.calibrate) if needs_data(plan.subject.groups) else Heard()
