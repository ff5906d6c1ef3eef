"""The calibration set of a config, what is held out of it, and whether it is enough."""

from __future__ import annotations

from collections.abc import Sequence

from lowrank_compress.calibration.capture import loss_terms
from lowrank_compress.calibration.examples import example_batches
from lowrank_compress.calibration.sources import Source, pieces, read_examples, shuffled
from lowrank_compress.calibration.statistics import ENOUGH
from lowrank_compress.calibration.tokens import bos_of, encode, load_tokenizer, renderer, vocabulary_of
from lowrank_compress.calibration.windows import calibration_windows, drawn_windows, window_batches
from lowrank_compress.config import CalibrationSet
from lowrank_compress.errors import InputError
from lowrank_compress.methods.groups import TargetGroup
from lowrank_compress.model.blueprint import Task
from lowrank_compress.model.checkpoint import Checkpoint
from lowrank_compress.model.walk.batch import Batch


def source_of(config: CalibrationSet) -> Source:
    """Name the text of a config.

    Raises
    ------
    InputError
        It names none.
    """
    if config.source is None:
        raise InputError("The method needs calibration data; name a text with --calibration.")
    return Source(config.source, config.text_column, config.label_column)


# Of text that plans are tried on: windows, and tokens in all of them.
TRIED_WINDOWS, TRIED_TOKENS = 16, 8192


def held_out_batches(config: CalibrationSet, checkpoint: Checkpoint, task: Task) -> list[Batch]:
    """Make a set like the calibration set of what follows it after the shuffle: some windows, or examples.

    A text that is spent by the calibration set has none left; then it is the first of that set.
    """
    count = max(1, min(TRIED_WINDOWS, TRIED_TOKENS // config.seq_len))
    few = CalibrationSet.of(config, samples=count)
    return calibration_batches(few, checkpoint, task, skip=config.samples) or calibration_batches(few, checkpoint, task)


def calibration_batches(config: CalibrationSet, checkpoint: Checkpoint, task: Task, *, skip: int = 0) -> list[Batch]:
    """Make the calibration set of a config: windows of text, or examples for a classifier and an embedding model.

    Of the shuffled ones the first `skip` are left out; there may be none after them.

    Raises
    ------
    CalibrationError, InputError
        The data are missing, empty, too short or have no such column.
    """
    tokenizer = load_tokenizer(checkpoint.path, checkpoint.trust_remote_code)
    source, vocabulary = source_of(config), vocabulary_of(checkpoint)
    named = config.text_column is not None or config.label_column is not None
    if task != "lm" and (named or (source.is_table and not source.is_hub)):
        examples = shuffled(read_examples(source), skip + config.samples, config.seed)
        return example_batches(
            tokenizer,
            examples.picked(range(len(examples.texts))[skip:]),
            checkpoint.class_ids if task == "classification" else {},
            config.seq_len,
            config.micro_batch,
            vocabulary,
        )
    ids = encode(tokenizer, pieces(source, renderer(tokenizer)), vocabulary)
    bos = bos_of(tokenizer, vocabulary)
    windows = calibration_windows(ids, config.seq_len, skip + config.samples, config.seed, bos)[skip:]
    return window_batches(list(windows), config.micro_batch)


def with_drawn(batches: Sequence[Batch], each: int, checkpoint: Checkpoint, task: Task) -> list[Batch]:
    """Add windows of random tokens to those of a language model's text (`windows.drawn_windows`)."""
    vocabulary = vocabulary_of(checkpoint)
    if task != "lm" or vocabulary is None:
        return list(batches)
    return [*batches, *drawn_windows(batches, vocabulary, each)]


def too_few(groups: Sequence[TargetGroup], batches: Sequence[Batch], gradient: bool) -> str | None:
    """Say what is under-determined by a calibration set, what that may cost, and what would be enough; None if nothing.

    What a classifier's gradients say is counted by examples, of which each has one loss.
    """
    examples = gradient and batches[0].labels is not None
    seen = sum(loss_terms(batch) if examples else batch.tokens for batch in batches)
    widest = max(groups, key=lambda group: min(group.shape))
    largest = min(widest.shape)
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
