"""What a text or a table becomes for the head of a model: to calibrate on, and to measure on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from lowrank_compress.calibration.examples import example_batches
from lowrank_compress.calibration.labelled import has_labels, labelled_batches, needs, read_labelled
from lowrank_compress.calibration.masking import frame_of, masked_windows, read_in_parts
from lowrank_compress.calibration.passages import passages
from lowrank_compress.calibration.several import marked_batches, read_marked
from lowrank_compress.calibration.sources import Examples, Source, pieces, read_examples, shuffled
from lowrank_compress.calibration.tokens import bos_of, encode, renderer, vocabulary_of
from lowrank_compress.calibration.windows import calibration_windows, evaluation_windows, window_batches
from lowrank_compress.config import CalibrationSet, EvaluateConfig
from lowrank_compress.errors import CalibrationError, InputError
from lowrank_compress.model.blueprint import Blueprint
from lowrank_compress.model.checkpoint import Checkpoint
from lowrank_compress.model.embedding import longest_of
from lowrank_compress.model.tasks import NEED_EXAMPLES, Task
from lowrank_compress.model.walk.batch import Batch

# Heads whose outputs are each a number or a label.
SCORED: tuple[Task, ...] = ("scores", "labels")
# Of a passage of plain text, for each token that is read of it at most.
CHARACTERS = 6


def source_batches(
    config: CalibrationSet,
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    checkpoint: Checkpoint,
    task: Task,
    skip: int,
) -> list[Batch]:
    """Make the calibration set of one source, as the head of a model reads it.

    Parameters
    ----------
    skip
        So many of the shuffled windows or examples are left out first.

    Raises
    ------
    CalibrationError, InputError
        The data are missing, empty, too short, or have no such column.
    """
    vocabulary = vocabulary_of(checkpoint)
    if task == "embedding":
        return _embedded(config, source, tokenizer, checkpoint, skip)
    if task == "masked":
        return _masked(config, source, tokenizer, vocabulary, skip)
    if has_labels(task, source):
        labelled = read_labelled(task, source, tokenizer)
        order = torch.randperm(len(labelled.examples), generator=torch.Generator().manual_seed(config.seed)).tolist()
        chosen = order[skip : skip + config.samples]
        return labelled_batches(task, labelled, chosen, tokenizer, checkpoint, config.seq_len, config.micro_batch)
    if task in SCORED and has_examples(source):
        examples = shuffled(read_marked(task, source, checkpoint), skip + config.samples, config.seed)
        chosen = examples.picked(range(len(examples.texts))[skip:])
        return marked_batches(chosen, tokenizer, checkpoint, config.seq_len, config.micro_batch)
    if task != "lm" and has_examples(source):
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


def has_examples(source: Source) -> bool:
    """Whether a source of a model that is none of language is read as examples, and not as a running text."""
    named = source.text_column is not None or source.label_column is not None
    return named or (source.is_table and not source.is_hub)


def _embedded(
    config: CalibrationSet, source: Source, tokenizer: PreTrainedTokenizerBase, checkpoint: Checkpoint, skip: int
) -> list[Batch]:
    """Make the batches of a model without a head: rows of a table, or passages of a text, as it is to read them."""
    longest = longest_of(checkpoint)
    seq_len = config.seq_len if longest is None else min(config.seq_len, longest)
    if source.is_table and not (source.is_hub and source.text_column is None):
        found = read_examples(replace(source, label_column=None))
    else:
        found = Examples(list(passages(pieces(source, renderer(tokenizer)), CHARACTERS * seq_len)), None)
    examples = shuffled(found, skip + config.samples, config.seed).picked
    chosen = examples(range(min(skip + config.samples, len(found.texts)))[skip:])
    batches = example_batches(tokenizer, chosen, {}, seq_len, config.micro_batch, vocabulary_of(checkpoint))
    return [replace(batch, outputs=1) for batch in batches]


def _masked(
    config: CalibrationSet, source: Source, tokenizer: PreTrainedTokenizerBase, vocabulary: int | None, skip: int
) -> list[Batch]:
    """Make windows of a text with some tokens masked; which, does not depend on how many windows are left out."""
    frame = frame_of(tokenizer, vocabulary)
    ids = encode(tokenizer, pieces(source, renderer(tokenizer)), vocabulary)
    length = _room(config.seq_len, frame.length)
    windows = calibration_windows(ids, length, skip + config.samples, config.seed, None)
    return masked_windows(windows, frame, config.micro_batch, config.seed, skip)


def _room(seq_len: int, around: int) -> int:
    if seq_len <= around:
        raise InputError(f"--seq-len {seq_len} leaves no room for text beside the {around} tokens around it. Use more.")
    return seq_len - around


def text_batches(
    config: EvaluateConfig, tokenizer: Any, source: Source, seq_len: int, vocabulary: int | None = None
) -> list[Batch]:
    """Windows of an evaluation text.

    Raises
    ------
    CalibrationError
        The text is empty or has a single token.
    """
    bos = bos_of(tokenizer, vocabulary)
    most = None if config.limit is None else config.limit * seq_len
    ids = encode(tokenizer, pieces(source, renderer(tokenizer)), vocabulary, most=most)
    windows = evaluation_windows(ids, seq_len, bos)[: config.limit]
    windows = [window for window in windows if len(window) > 1]
    if not windows:
        raise CalibrationError(f"{source.name} has too few tokens to measure perplexity on. Pass a longer text.")
    return window_batches(windows, config.batch_size)


def masked_text_batches(
    config: EvaluateConfig, tokenizer: Any, source: Source, seq_len: int, vocabulary: int | None = None
) -> list[Batch]:
    """Windows of an evaluation text, each read several times with other tokens masked, until all have been.

    Raises
    ------
    CalibrationError
        The text is empty.
    """
    frame = frame_of(tokenizer, vocabulary)
    length = _room(seq_len, frame.length)
    most = None if config.limit is None else config.limit * length
    ids = encode(tokenizer, pieces(source, renderer(tokenizer)), vocabulary, most=most)
    windows = [window for window in ids.split(length)[: config.limit] if len(window)]
    if not windows:
        raise CalibrationError(f"{source.name} has no tokens to measure perplexity on. Pass a longer text.")
    return read_in_parts(windows, frame, config.batch_size, config.seed)


def require_labels(batches: Sequence[Batch], task: Task) -> None:
    """Refuse data without labels where the loss of a head is against some, and running text where it is of examples.

    Raises
    ------
    InputError
        So it is.
    """
    if task in NEED_EXAMPLES and any(batch.labels is None and not batch.outputs for batch in batches):
        raise InputError(
            f"Gradients are taken of the loss of the model's head, which {_loss_of(task)}. Pass {needs(task)}; or "
            "choose a method without gradients, for instance --method svd-llm."
        )


def _loss_of(task: Task) -> str:
    return "is of examples" if task in SCORED else "needs labels"


def refuse_unlabelled(method: str, design: Blueprint, sources: Sequence[Source]) -> None:
    """Refuse, before any work, a method of gradients where there is no loss to take them of.

    Parameters
    ----------
    sources
        What is named to calibrate on; none where nothing is.

    Raises
    ------
    InputError
        Labels, or examples, are missing.
    """
    task, name = design.task, type(design.model).__name__
    instead = "Or choose a method without gradients, for instance --method svd-llm or modegpt."
    if task == "classification" and not sources:
        raise InputError(
            f"The method {method} needs labelled examples of a classifier: pass --calibration FILE.tsv with "
            "--text-column and --label-column."
        )
    enough = has_examples if task in SCORED else partial(has_labels, task)
    if task in ("tokens", "answers", *SCORED) and not (sources and all(map(enough, sources))):
        raise InputError(
            f"The method {method} takes gradients of the loss of a {name}, which {_loss_of(task)}: pass as "
            f"--calibration {needs(task)}. {instead}"
        )
