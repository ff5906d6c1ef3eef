"""Stage 1: take from the calibration set the statistics that a method needs.

Reads a checkpoint and a text; writes one safetensors file of means a block.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from lowrank_compress.arch.resolve import Resolved
from lowrank_compress.artifacts.manifest import Key, Manifest, commit, committed, read_manifest
from lowrank_compress.artifacts.tensors import BlockFiles
from lowrank_compress.calibration.capture import capture, loss_terms, needs_gradient
from lowrank_compress.calibration.sources import Source, pieces, read_examples, shuffled
from lowrank_compress.calibration.statistics import ENOUGH
from lowrank_compress.calibration.tokens import (
    batches_hash,
    bos_of,
    calibration_windows,
    encode,
    example_batches,
    load_tokenizer,
    renderer,
    vocabulary_of,
    window_batches,
)
from lowrank_compress.calibration.workers import Workers
from lowrank_compress.config import CalibrateConfig
from lowrank_compress.errors import ArtifactError, InputError
from lowrank_compress.methods.matrix_unit import MatrixUnit
from lowrank_compress.methods.sites import all_units, sites_of
from lowrank_compress.methods.units import Unit, full_rank, needed, needs_data
from lowrank_compress.model.blueprint import Task, blueprint
from lowrank_compress.model.checkpoint import Checkpoint
from lowrank_compress.model.narrowing import check_narrowing
from lowrank_compress.model.skeleton import Skeleton
from lowrank_compress.model.walk.batch import Batch
from lowrank_compress.stages.environment import environment
from lowrank_compress.stages.identity import checkpoint_id, source_id
from lowrank_compress.stages.reporting import Reporter, Silent, in_parts

VERSION = 5


@dataclass(frozen=True)
class Inputs:
    """What the stage reads: a dense checkpoint (the text is named in the config)."""

    checkpoint: Checkpoint


class Sink(Protocol):
    """Takes blocks' statistics as soon as they are complete.

    Attributes
    ----------
    step
        What that is called in a report of progress.
    """

    step: str

    @property
    def at_once(self) -> int:
        """How many blocks it would like to take together."""
        ...

    def finished(self, block: int) -> bool:
        """Whether the block has been taken by this or an earlier process."""
        ...

    def take(self, blocks: Mapping[int, MutableMapping[str, Tensor]]) -> None:
        """Take the statistics of blocks; the mapping of each is the sink's to empty."""
        ...

    def settle(self) -> None:
        """Return when all blocks that were taken are on disk."""
        ...


class FileSink:
    """Keeps statistics in the stage's directory."""

    step, at_once = "keep", 1

    def __init__(self, files: BlockFiles) -> None:
        self.files = files

    def finished(self, block: int) -> bool:
        """Whether the block's file is on disk, whole and of this calibration."""
        return self.files.finished(block)

    def take(self, blocks: Mapping[int, MutableMapping[str, Tensor]]) -> None:
        """Write the blocks' files."""
        for block, means in blocks.items():
            self.files.write(block, means)

    def settle(self) -> None:
        """Do nothing: they are."""


def key(config: CalibrateConfig, inputs: Inputs, text: str | None = None) -> Key:
    """Everything the statistics depend on; a text counts by its content, not by its path.

    `text` is the identity of that content where the text itself need not be there; None to look.
    """
    resolved = blueprint(inputs.checkpoint).resolved
    units = _measured(resolved, config)
    found = {"checkpoint": checkpoint_id(inputs.checkpoint)}
    if needs_data(units):
        found["text"] = text or source_id(_source(config))
    settings = config.model_dump(mode="json", exclude={"source", "scheme", "rival"})
    wanted = needed(units)
    by_role: dict[str, set[str]] = {}
    for target in resolved.targets:
        by_role.setdefault(target.role, set()).update(wanted.get(target.name, ()))
    settings["statistics"] = {role: sorted(names) for role, names in by_role.items()}
    return Key("calibrate", VERSION, settings, found)


def run(
    config: CalibrateConfig,
    inputs: Inputs,
    out_dir: Path,
    reporter: Reporter | None = None,
    *,
    sink: Sink | None = None,
    memory: int | None = None,
    workers: Workers = Workers(),
    overwrite: bool = False,
) -> Manifest:
    """Calibrate.

    Parameters
    ----------
    config, inputs
        What to do on what.
    out_dir
        Directory for the manifest and, without a `sink`, the statistics.
    reporter
        Told about progress and warnings.
    sink
        Takes the statistics instead of files in `out_dir`; the manifest then says that they were not kept.
    memory
        Bytes to get by with; None for what is free. Hidden states take half of it at most. It changes no result.
    workers
        The processes that do this together, all called with the same.
    overwrite
        Replace another result in `out_dir`.

    Raises
    ------
    LrcError
        Bad data, an unsupported or damaged checkpoint, another result in `out_dir`.
    """
    reporter = reporter or Silent()
    identity = key(config, inputs)
    found = workers.once(lambda: committed(out_dir, identity, overwrite=overwrite))
    kept = sink is None
    plan = blueprint(inputs.checkpoint)
    resolved = plan.resolved
    units = all_units(sites_of(resolved, config.scheme))
    files = BlockFiles(out_dir, identity.id)
    receiver = sink or FileSink(files)
    blocks = range(len(resolved.blocks))
    missing = workers.once(lambda: [block for block in blocks if not receiver.finished(block)])
    complete = not missing
    if found is not None and complete and (found.report["kept"] or not kept):
        return found
    wanted = needed(_measured(resolved, config))
    report: dict[str, object] = {"kept": kept, "tokens": 0, "windows": 0, "tokens_sha256": None}
    outputs = [files.name(block) for block in blocks] if kept else []
    if not needs_data(units):
        own = workers.share(missing)
        for done, part in in_parts(own, receiver.at_once):
            receiver.take({block: {} for block in part})
            reporter.advance(receiver.step, done, len(own))
        receiver.settle()
        return workers.once(lambda: commit(out_dir, identity, outputs, report, environment(config.device)))
    batches = calibration_batches(config, inputs.checkpoint, plan.task)
    if needs_gradient(wanted) and any(batch.labels is None for batch in batches) and plan.task != "lm":
        raise InputError(
            "The method takes gradients of a classifier's loss, which needs labels. Pass a table with --text-column "
            "and --label-column."
        )
    reporter.advance("tokenize", 1, 1)
    tokens = sum(batch.tokens for batch in batches)
    report |= {
        "tokens": tokens,
        "windows": sum(len(batch.ids) for batch in batches),
        "tokens_sha256": batches_hash(batches),
    }
    count, what = sum(len(batch.ids) for batch in batches), "windows" if batches[0].labels is None else "examples"
    if count < config.samples:
        reporter.warn(
            f"The calibration text has {count} {what}, fewer than the {config.samples} asked for; all are taken. Pass "
            "more text, a smaller --seq-len, or a smaller --samples."
        )
    if few := too_few(units, batches, needs_gradient(wanted)):
        reporter.warn(few)
    if any(unit.loses_mean for unit in units if isinstance(unit, MatrixUnit)):
        reporter.warn(
            "afm restores the mean through biases, and some layers of this model have none: there it uses the "
            "uncentred Gram matrix and restores no mean."
        )
    if not complete:
        skeleton = Skeleton(inputs.checkpoint, torch.device(config.device), torch.float32)
        if any(target.heads is not None for unit in units if len(unit.targets) > 1 for target in unit.targets):
            check_narrowing(skeleton, batches[0])
        out_dir.mkdir(parents=True, exist_ok=True)
        own = len(workers.share(missing))
        captured = capture(
            skeleton,
            batches,
            wanted,
            skip=lambda block: block not in missing,
            clip=config.clip,
            advance=reporter.advance,
            spill_to=out_dir,
            memory=None if memory is None else memory // 2,
            workers=workers,
            halves=config.held_out,
        )
        for done, part in in_parts(captured, receiver.at_once):
            receiver.take({statistics.block: statistics.means for statistics in part})
            for statistics in part:
                statistics.means.clear()  # they are large, and the next block's are under way
            reporter.advance(receiver.step, done, own)
        receiver.settle()
    return workers.once(lambda: commit(out_dir, identity, outputs, report, environment(config.device)))


def too_few(units: Sequence[Unit], batches: Sequence[Batch], gradient: bool) -> str | None:
    """Say what is under-determined by a calibration set, what that may cost, and what would be enough; None if nothing.

    What a classifier's gradients say is counted by examples, of which each has one loss.
    """
    examples = gradient and batches[0].labels is not None
    seen = sum(loss_terms(batch) if examples else batch.tokens for batch in batches)
    widest = max(units, key=full_rank)
    largest = full_rank(widest)
    if seen >= largest:
        return None
    windows = sum(len(batch.ids) for batch in batches)
    more = -(-ENOUGH * largest * windows // seen)
    return (
        f"The calibration set has {seen} {'examples' if examples else 'tokens'} for the {largest} dimensions of "
        f"{widest.name}: its moments are rank-deficient, and say nothing of most directions. Quality will vary with "
        "the sample and be worse on other text, the more the larger the ratio: perplexities of up to ten times those "
        f"from enough text were measured. Enough is {ENOUGH} for each dimension, here --samples {more}."
    )


def _measured(resolved: Resolved, config: CalibrateConfig) -> tuple[Unit, ...]:
    """Units that statistics are taken for: those of the scheme, and those of the one that plans are held against."""
    schemes = [config.scheme, *([] if config.rival is None else [config.rival])]
    return tuple(unit for scheme in schemes for unit in all_units(sites_of(resolved, scheme)))


def kept(directory: Path, identity: Key) -> bool:
    """Whether the statistics of a calibration were kept in a directory."""
    try:
        found = read_manifest(directory)
    except ArtifactError:
        return False
    return found is not None and found.id == identity.id and found.report["kept"]


def _source(config: CalibrateConfig) -> Source:
    if config.source is None:
        raise InputError("The method needs calibration data; name a text with --calibration.")
    return Source(config.source, config.text_column, config.label_column)


# Of text that plans are tried on: windows, and tokens in all of them.
TRIED_WINDOWS, TRIED_TOKENS = 16, 8192


def held_out_batches(config: CalibrateConfig, checkpoint: Checkpoint) -> list[Batch]:
    """Make a set like the calibration set of what follows it after the shuffle: some windows, or examples.

    A text that is spent by the calibration set has none left; then it is the first of that set.
    """
    count = max(1, min(TRIED_WINDOWS, TRIED_TOKENS // config.seq_len))
    task, few = blueprint(checkpoint).task, config.model_copy(update={"samples": count})
    return calibration_batches(few, checkpoint, task, skip=config.samples) or calibration_batches(few, checkpoint, task)


def calibration_batches(config: CalibrateConfig, checkpoint: Checkpoint, task: Task, *, skip: int = 0) -> list[Batch]:
    """Make the calibration set of a config: windows of text, or examples for a classifier.

    Of the shuffled ones the first `skip` are left out; there may be none after them.

    Raises
    ------
    CalibrationError, InputError
        The data are missing, empty, too short or have no such column.
    """
    tokenizer = load_tokenizer(checkpoint.path, checkpoint.trust_remote_code)
    source, vocabulary = _source(config), vocabulary_of(checkpoint)
    named = config.text_column is not None or config.label_column is not None
    if task == "classification" and (named or (source.is_table and not source.is_hub)):
        examples = shuffled(read_examples(source), skip + config.samples, config.seed)
        return example_batches(
            tokenizer,
            examples.picked(range(len(examples.texts))[skip:]),
            checkpoint.class_ids,
            config.seq_len,
            config.micro_batch,
            vocabulary,
        )
    ids = encode(tokenizer, pieces(source, renderer(tokenizer)), vocabulary)
    bos = bos_of(tokenizer, vocabulary)
    windows = calibration_windows(ids, config.seq_len, skip + config.samples, config.seed, bos)[skip:]
    return window_batches(list(windows), config.micro_batch)
