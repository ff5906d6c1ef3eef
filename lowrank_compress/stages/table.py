"""All stages by name."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

from lowrank_compress.config import CalibrateConfig, EvaluateConfig, FactorizeConfig, RefineConfig, ScoreConfig
from lowrank_compress.registry import Registry
from lowrank_compress.stages import cache, calibrate, cast, evaluate, factorize, quantize, recover, refine, score
from lowrank_compress.stages.cacheconfig import CacheConfig
from lowrank_compress.stages.edits import ranks_fit
from lowrank_compress.stages.inputs import inputs_of_calibrate, inputs_of_factorize, inputs_of_score
from lowrank_compress.stages.quantizeconfig import QuantizeConfig
from lowrank_compress.stages.ranks import RANKS
from lowrank_compress.stages.recoverconfig import RecoverConfig
from lowrank_compress.stages.run import Run
from lowrank_compress.stages.stage import Given, Stage, Writes

_OWN = (
    Stage(
        name="calibrate",
        version=calibrate.VERSION,
        config=CalibrateConfig,
        inputs=inputs_of_calibrate,
        run=calibrate.run,
        reads="recipe",
        writes="data",
        directory="stats",
        command="calibrate",
        help="statistics of the calibration set, block by block",
    ),
    Stage(
        name="score",
        version=score.VERSION,
        config=ScoreConfig,
        inputs=inputs_of_score,
        run=score.run,
        reads="recipe",
        writes="data",
        directory="scores",
        command="score",
        help="bases of every matrix, and ranks under the budget",
        editable={RANKS: ranks_fit},
    ),
    Stage(
        name="factorize",
        version=factorize.VERSION,
        config=FactorizeConfig,
        inputs=inputs_of_factorize,
        run=factorize.run,
        reads="recipe",
        writes="checkpoint",
        directory="model",
        command="factorize",
        help="the compressed checkpoint",
    ),
    Stage(
        name="refine",
        version=refine.VERSION,
        config=RefineConfig,
        inputs=Given,
        run=refine.run,
        reads="checkpoint",
        writes="checkpoint",
        directory="refine",
        command="refine",
        help="the same matrices, fitted anew to what the dense model does",
        needs_dense=True,
    ),
    Stage(
        name="recover",
        version=recover.VERSION,
        config=RecoverConfig,
        inputs=Given,
        run=recover.run,
        reads="checkpoint",
        writes="checkpoint",
        directory="recover",
        command="recover",
        help="short training, the dense model as teacher",
        needs_dense=True,
    ),
    Stage(
        name="cache",
        version=cache.VERSION,
        config=CacheConfig,
        inputs=Given,
        run=cache.run,
        reads="checkpoint",
        writes="checkpoint",
        directory="cache",
        command="cache",
        help="the same matrices, and a latent of each token cached",
    ),
    Stage(
        name="cast",
        version=cast.VERSION,
        config=cast.CastConfig,
        inputs=Given,
        run=cast.run,
        reads="checkpoint",
        writes="checkpoint",
        directory="cast",
        command="cast",
        help="the same weights in another dtype",
    ),
    Stage(
        name="quantize",
        version=quantize.VERSION,
        config=QuantizeConfig,
        inputs=Given,
        run=quantize.run,
        reads="checkpoint",
        writes="checkpoint",
        directory="quantize",
        command="quantize",
        help="the same matrices in a few bits a weight",
    ),
    Stage(
        name="evaluate",
        version=evaluate.VERSION,
        config=EvaluateConfig,
        inputs=Given,
        run=evaluate.run,
        reads="checkpoint",
        writes="measurements",
        directory="eval",
        command="eval",
        help="perplexity, accuracy, tasks and sizes, beside the dense original",
    ),
)

STAGES: Registry[Stage] = Registry("stage", "lowrank_compress.stages", {stage.name: stage for stage in _OWN}, Stage)


def in_order() -> list[Stage]:
    """Return the stages as they follow each other: the recipe's, those that change weights, those that measure."""
    written = get_args(Writes)
    return sorted(STAGES.values(), key=lambda stage: (stage.reads != "recipe", written.index(stage.writes)))


def directories(run: Run) -> list[Path]:
    """Name all directories of a run, whether they are there or not."""
    return [
        *dict.fromkeys(run.path / stage.directory for stage in in_order()),
        run.unrefined,
        run.unquantized,
        run.work,
    ]
