"""The stages in a row, over a run directory, as a recipe asks for them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lowrank_compress.allocation.storage import STORAGES
from lowrank_compress.allocation.table import ALLOCATORS
from lowrank_compress.artifacts.files import read_json, write_json, write_text
from lowrank_compress.artifacts.manifest import Manifest, difference, read_manifest
from lowrank_compress.calibration.capture import needs_gradient
from lowrank_compress.calibration.sources import PAPERS_DATA
from lowrank_compress.calibration.tokens import load_tokenizer
from lowrank_compress.config import DTYPES, CalibrateConfig, EvaluateConfig, FactorizeConfig, Recipe, ScoreConfig
from lowrank_compress.errors import ArtifactError, InputError, UnsupportedError
from lowrank_compress.methods.linear import needed
from lowrank_compress.methods.table import METHODS
from lowrank_compress.model.blueprint import blueprint
from lowrank_compress.model.checkpoint import Checkpoint, locate
from lowrank_compress.registry import unknown
from lowrank_compress.stages import calibrate, evaluate, factorize, score
from lowrank_compress.stages.bases import Bases
from lowrank_compress.stages.common import Reporter, Run, Silent, checkpoint_id, compute_device, display_name

# Tokens a micro-batch unless the recipe says otherwise: a result depends on it in the last bits, so it is in the key.
MICRO_BATCH_TOKENS = 4096
PAPERS_SEQ_LEN = 2048


@dataclass(frozen=True)
class Plan:
    """A recipe with every default decided, and the checkpoint it is for."""

    recipe: Recipe
    checkpoint: Checkpoint
    seq_len: int
    device: str
    dtype: str

    @property
    def calibrate(self) -> CalibrateConfig:
        """Config of the calibrate stage."""
        recipe = self.recipe
        return CalibrateConfig(
            method=recipe.method,
            source=recipe.calibration,
            text_column=recipe.text_column,
            label_column=recipe.label_column,
            samples=recipe.samples,
            seq_len=self.seq_len,
            seed=recipe.seed,
            micro_batch=recipe.micro_batch or max(1, MICRO_BATCH_TOKENS // self.seq_len),
            clip=recipe.clip,
            device=self.device,
        )

    @property
    def score(self) -> ScoreConfig:
        """Config of the score stage."""
        recipe = self.recipe
        method = METHODS[recipe.method]
        return ScoreConfig(
            method=recipe.method,
            allocate=recipe.allocate or method.allocate,
            storage=recipe.storage or method.storage,
            ratio=recipe.ratio,
            ratio_of=recipe.ratio_of,
            damping_fisher=recipe.damping_fisher,
            damping_gram=recipe.damping_gram,
            alpha=recipe.alpha,
            floor=recipe.floor,
            device=self.device,
        )

    @property
    def factorize(self) -> FactorizeConfig:
        """Config of the factorize stage."""
        recipe = self.recipe
        storage = recipe.storage or METHODS[recipe.method].storage
        return FactorizeConfig(method=recipe.method, storage=storage, dtype=self.dtype, device=self.device)

    def resolved(self) -> Recipe:
        """The recipe with all defaults written out; it repeats the run on its own."""
        model = (
            str(self.checkpoint.path.resolve()) if Path(self.recipe.model).expanduser().is_dir() else self.recipe.model
        )
        source = self.recipe.calibration
        if source is not None and not source.startswith("hf:"):
            source = str(Path(source).resolve())
        return self.recipe.model_copy(
            update={
                "model": model,
                "calibration": source,
                "allocate": self.score.allocate,
                "storage": self.score.storage,
                "seq_len": self.seq_len,
                "micro_batch": self.calibrate.micro_batch,
                "device": self.device,
                "dtype": self.dtype,
            }
        )


def plan(recipe: Recipe) -> Plan:
    """Decide every default of a recipe and check it before any work.

    Raises
    ------
    LrcError
        An unknown name, a ratio outside (0, 1), an unsupported or damaged checkpoint, a sequence that is too long.
    """
    if not 0 < recipe.ratio < 1:
        raise InputError(
            f"--ratio {recipe.ratio} is not between 0 and 1: it is the share of parameters to remove, 0.3 for 30 %."
        )
    method = METHODS[recipe.method]
    allocate = recipe.allocate or method.allocate
    ALLOCATORS[allocate]
    storage = recipe.storage or method.storage
    if storage not in STORAGES:
        raise InputError(unknown("storage", storage, STORAGES))
    device = str(compute_device(recipe.device))
    checkpoint = Checkpoint(locate(recipe.model, recipe.revision), recipe.trust_remote_code)
    if checkpoint.raw_config.get("quantization_config") is not None:
        kind = checkpoint.raw_config["quantization_config"].get("quant_method")
        raise UnsupportedError(
            f"{recipe.model} is already compressed or quantized ({kind}); start from the dense checkpoint."
        )
    design = blueprint(checkpoint)
    if method.needs_data and recipe.calibration is None:
        if design.task == "classification" and needs_gradient(needed(method, design.resolved.targets)):
            raise InputError(
                f"The method {recipe.method} needs labelled examples of a classifier: pass --calibration FILE.tsv with "
                "--text-column and --label-column."
            )
        recipe = recipe.model_copy(update={"calibration": PAPERS_DATA})
    longest = design.longest_input()
    seq_len = recipe.seq_len or min(PAPERS_SEQ_LEN, longest)
    if seq_len > longest:
        raise InputError(
            f"--seq-len {seq_len} is more than the {longest} positions of the model. Use at most {longest}."
        )
    if method.needs_data:
        load_tokenizer(checkpoint.path, recipe.trust_remote_code)
    dtype = recipe.dtype or str(checkpoint.dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise InputError(f"The checkpoint's weights are {dtype}; name an output --dtype: {', '.join(DTYPES)}.")
    return Plan(recipe, checkpoint, seq_len, device, dtype)


def default_run(recipe: Recipe) -> Path:
    """Where a run goes without ``--out``: runs/<model>-<method>-<ratio>."""
    return Path("runs") / f"{display_name(recipe.model).replace('/', '--')}-{recipe.method}-{recipe.ratio:g}"


def claim(run: Run, plan: Plan, *, overwrite: bool) -> None:
    """Make a run directory this recipe's, or find that it is.

    Raises
    ------
    ArtifactError
        It holds something else, or the run of another recipe.
    """
    mine = plan.resolved()
    if run.recipe.exists():
        there = yaml.safe_load(run.recipe.read_text(encoding="utf-8")) or {}
        asked = mine.model_dump(mode="json")
        if there != asked and run.begun() and not overwrite:
            raise ArtifactError(
                f"{run.path} is the run of another recipe: {difference(there, asked)}. Choose another directory with "
                "--out, or pass --overwrite to replace it."
            )
    elif run.begun():
        raise ArtifactError(
            f"{run.path} is not empty and is no run of this program. Choose another directory with --out."
        )
    write_text(run.recipe, mine.to_yaml())


def inputs_of_score(plan: Plan, run: Run) -> score.Inputs:
    """What the score stage reads in this run."""
    calibration = calibrate.key(plan.calibrate, calibrate.Inputs(plan.checkpoint))
    return score.Inputs(plan.checkpoint, calibration, run.statistics)


def compress(
    plan: Plan, run: Run, reporter: Reporter | None = None, *, keep_statistics: bool = False, overwrite: bool = False
) -> Manifest:
    """Calibrate, score and factorize; a block's statistics are scored as soon as they are complete and then dropped.

    Parameters
    ----------
    plan
        What to do.
    run
        Where; claimed and locked by the caller.
    reporter
        Told about progress and warnings.
    keep_statistics
        Keep them in ``stats/``; the result is the same, byte for byte.
    overwrite
        Replace other results.
    """
    reporter = reporter or Silent()
    inputs = inputs_of_score(plan, run)
    found = score.committed_scores(run.scores, score.key(plan.score, inputs), overwrite=overwrite)
    if found is None:
        keep_statistics = keep_statistics or calibrate.kept(run.statistics, inputs.calibration)
        bases = Bases(plan.score, plan.checkpoint, inputs.calibration.id, run.scores)
        calibrate.run(
            plan.calibrate,
            calibrate.Inputs(plan.checkpoint),
            run.statistics,
            reporter,
            sink=None if keep_statistics else bases,
            overwrite=overwrite,
        )
        score.run(plan.score, inputs, run.scores, reporter, overwrite=overwrite)
    return finish(plan, run, reporter, overwrite=overwrite)


def finish(plan: Plan, run: Run, reporter: Reporter | None = None, *, overwrite: bool = False) -> Manifest:
    """Factorize and name the final checkpoint in run.json."""
    manifest = factorize.run(
        plan.factorize, factorize.Inputs(plan.checkpoint, run.scores), run.model, reporter, overwrite=overwrite
    )
    write_json(
        run.index,
        {
            "schema": 1,
            "model": run.model.name,
            "base": plan.resolved().model,
            "revision": plan.recipe.revision,
            "base_id": checkpoint_id(plan.checkpoint),
        },
    )
    return manifest


def evaluation_inputs(target: str, trust_remote_code: bool) -> tuple[evaluate.Inputs, Path | None]:
    """What to evaluate for a target, and where to keep it: a run with its dense original, or any checkpoint.

    Raises
    ------
    LrcError
        The target is neither, the run is unfinished, or its original is gone or changed.
    """
    run = Run(Path(target))
    if not run.recipe.exists():
        return evaluate.Inputs(Checkpoint(locate(target), trust_remote_code)), None
    final = run.final_model()
    index = read_json(run.index)
    manifest = read_manifest(final)
    if manifest is None:
        raise ArtifactError(f"{final} is not finished. Repeat `lrc compress` or `lrc factorize` on this run.")
    dense = Checkpoint(locate(index["base"], index.get("revision")), trust_remote_code)
    if checkpoint_id(dense) != index["base_id"]:
        raise ArtifactError(
            f"{index['base']} is not the checkpoint that {target} was made from: its files have changed since. Restore "
            f"it, or evaluate {final} by itself."
        )
    return evaluate.Inputs(Checkpoint(final), dense, manifest.report), run.evaluations


def evaluate_target(target: str, config: EvaluateConfig, reporter: Reporter | None = None) -> dict[str, Any]:
    """Evaluate a run or a checkpoint."""
    inputs, out_dir = evaluation_inputs(target, config.trust_remote_code)
    return evaluate.run(config, inputs, out_dir, reporter)
