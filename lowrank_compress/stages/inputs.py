"""What the stages of a recipe read in a run."""

from __future__ import annotations

from lowrank_compress.artifacts.manifest import Key, read_manifest
from lowrank_compress.errors import CalibrationError
from lowrank_compress.methods.groups import needs_data
from lowrank_compress.model.walk.batch import Batch
from lowrank_compress.stages import calibrate, factorize, score
from lowrank_compress.stages.plan import Plan
from lowrank_compress.stages.run import Run
from lowrank_compress.stages.samples import held_out_batches, sources_of


def inputs_of_calibrate(plan: Plan, run: Run) -> calibrate.Inputs:
    """What the calibrate stage reads: nothing of the run."""
    return calibrate.Inputs(plan.subject)


def inputs_of_score(plan: Plan, run: Run) -> score.Inputs:
    """What the score stage reads in this run."""

    def held_out() -> list[Batch]:
        return held_out_batches(plan.calibrate, plan.checkpoint, plan.subject.model.task)

    calibration = _calibration(plan, run)
    again = plan.calibrate if plan.score.second else None
    return score.Inputs(plan.subject, calibration, run.statistics, held_out if plan.score.held_out else None, again)


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
    return factorize.Inputs(plan.subject.model, run.scores, _datasets(plan))


def _datasets(plan: Plan) -> tuple[str, ...]:
    """Name the data sets of the hub that the calibration reads."""
    if plan.calibrate.source is None or not needs_data(plan.subject.groups):
        return ()
    names = [source.name.split(":")[1] for source in sources_of(plan.calibrate) if source.is_hub]
    return tuple(dict.fromkeys(names))
