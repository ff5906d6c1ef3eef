"""What a page says of a run, gathered from what the run holds; what it lacks is left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lowrank_compress.artifacts.files import read_small_text
from lowrank_compress.artifacts.manifest import Manifest, read_manifest
from lowrank_compress.calibration.sources import Source
from lowrank_compress.calibration.tokens import load_tokenizer, vocabulary_of
from lowrank_compress.config import evaluate_config
from lowrank_compress.errors import ArtifactError, InputError
from lowrank_compress.evaluation.per_block import BlockLoss, block_losses
from lowrank_compress.evaluation.size import Size, measure_size
from lowrank_compress.model.checkpoint import Checkpoint
from lowrank_compress.model.skeleton import Skeleton
from lowrank_compress.recipe import load_recipe
from lowrank_compress.recipefile import RECIPE_BYTES
from lowrank_compress.stages.card import measurements
from lowrank_compress.stages.chain import original_of
from lowrank_compress.stages.cost import read_cost
from lowrank_compress.stages.identity import display_name
from lowrank_compress.stages.naming import loss_unit, place_of
from lowrank_compress.stages.presenting import evaluations_of, report_of, spectra_of
from lowrank_compress.stages.reading import text_batches
from lowrank_compress.stages.repeating import commands_of
from lowrank_compress.stages.reporting import Reporter
from lowrank_compress.stages.run import Run
from lowrank_compress.strict import COMMAND_LINE


@dataclass(frozen=True)
class Matrix:
    """A matrix or module as it is stored.

    Attributes
    ----------
    block
        Number of its block; None for what is outside of all.
    kind
        What it is called in each block.
    kept
        Stored elements by dense ones; where these stay as they are, numbers that the cache keeps by those of a stock
        one.
    """

    name: str
    block: int | None
    kind: str
    shape: tuple[int, ...]
    format: str
    rank: int | None
    kept: float
    predicted: float


@dataclass(frozen=True)
class RunFacts:
    """All that a page says of a run.

    Attributes
    ----------
    report
        lowrank.json.
    size, dense_size
        Elements and bytes of the checkpoint and of its original; None where that is not at hand.
    measured
        Rows of evaluations: metric, name, amount, and the values of "compressed" and "dense".
    spectra
        Squared singular values in the method's metric, by matrix.
    calibration, cost
        None where not known.
    options
        The recipe, as it is written out.
    commands
        How to make the run again.
    blocks
        What each block costs by itself; empty where it was not measured.
    chain
        The stages that wrote the checkpoint.
    """

    name: str
    path: str
    base: str
    report: Mapping[str, Any]
    matrices: tuple[Matrix, ...]
    size: Size
    dense_size: Size | None
    measured: tuple[Mapping[str, Any], ...]
    spectra: Mapping[str, Sequence[float]]
    calibration: Mapping[str, Any] | None
    environment: Mapping[str, Any]
    cost: Mapping[str, Any] | None
    recipe: str
    options: Mapping[str, Any]
    commands: tuple[str, ...]
    chain: tuple[str, ...]
    blocks: tuple[BlockLoss, ...] = field(default=())

    @property
    def unit(self) -> str:
        """What losses are measured in, and of what."""
        return loss_unit(self.report)

    @property
    def predicted(self) -> dict[int, float]:
        """Predicted losses of the matrices of each block, added up; empty where they do not add up."""
        found: dict[int, float] = {}
        for matrix in self.matrices if self.report["unit"] == "nats" else ():
            if matrix.block is not None:
                found[matrix.block] = found.get(matrix.block, 0.0) + matrix.predicted
        return found


def facts_of(path: Path, reporter: Reporter, text: str | None, limit: int) -> RunFacts:
    """Gather what a run holds; with a text, measure each block by itself.

    Raises
    ------
    LrcError
        It is no finished run, or the text cannot be used.
    """
    run = Run(path)
    run.require()
    final = run.finished()
    checkpoint, report = Checkpoint(final.path), report_of(final)
    try:
        dense = original_of(final.index, str(path))
    except (ArtifactError, InputError) as problem:
        reporter.warn(f"The original of {path} is not looked at: {problem}")
        dense = None
    blocks: list[BlockLoss] = []
    if text is not None:
        if dense is None:
            raise ArtifactError(f"Blocks of {path} are measured beside the dense original, which is not at hand.")
        blocks = _measure(dense, checkpoint, text, limit, reporter)
    return RunFacts(
        name=path.resolve().name,
        path=str(path),
        base=display_name(final.index.base),
        report=report,
        matrices=tuple(_matrices(report)),
        size=measure_size(checkpoint),
        dense_size=None if dense is None else measure_size(dense),
        measured=tuple(measurements(evaluations_of(run, final))),
        spectra={name: found for name, found in spectra_of(run).items() if name in report["matrices"]},
        calibration=_calibration(run),
        environment=final.manifest.environment,
        cost=read_cost(run),
        recipe=read_small_text(run.recipe, RECIPE_BYTES),
        options=load_recipe(run.recipe, {}).model_dump(mode="json"),
        commands=tuple(commands_of(run, final.index)),
        chain=tuple(link.stage for link in final.index.chain),
        blocks=tuple(blocks),
    )


def _matrices(report: Mapping[str, Any]) -> list[Matrix]:
    found = []
    for name, entry in report["matrices"].items():
        block, kind = place_of(name)
        found.append(
            Matrix(
                name=name,
                block=block,
                kind=kind,
                shape=tuple(entry["shape"]),
                format=entry["format"],
                rank=entry.get("rank"),
                kept=entry["stored"] / entry["dense"] if entry["dense"] else entry["cached"] / entry["shape"][0],
                predicted=entry["predicted_loss"],
            )
        )
    return found


def _calibration(run: Run) -> dict[str, Any] | None:
    """Say what was calibrated on; None where nothing was."""
    try:
        manifest: Manifest | None = read_manifest(run.statistics)
    except ArtifactError:
        return None
    if manifest is None or not manifest.report.get("tokens"):
        return None
    source = load_recipe(run.recipe, {}).calibration
    names = [source] if isinstance(source, str) else [part.text for part in source or ()]
    return {
        "text": ", ".join(name if name.startswith("hf:") else Path(name).name for name in names),
        "texts": manifest.report.get("texts", []),
        **{name: manifest.report[name] for name in ("windows", "tokens", "tokens_sha256") if name in manifest.report},
        **{name: manifest.key.config[name] for name in ("seq_len", "seed") if name in manifest.key.config},
    }


def _measure(dense: Checkpoint, checkpoint: Checkpoint, text: str, limit: int, reporter: Reporter) -> list[BlockLoss]:
    """Measure each block of a language model in the place of the dense one."""
    one, other = (Skeleton(each, torch.device("cpu"), torch.float32) for each in (dense, checkpoint))
    if one.task != "lm":
        raise InputError("Blocks are measured by themselves on text, which needs a causal language model.")
    config = evaluate_config(COMMAND_LINE, limit=limit, batch_size=1)
    seq_len = min(512, one.blueprint.longest_input())
    tokenizer = load_tokenizer(dense.path, dense.trust_remote_code)
    batches = text_batches(config, tokenizer, Source(text), seq_len, vocabulary_of(dense))
    return block_losses(one, other, batches, lambda done, total: reporter.advance("blocks alone", done, total))
