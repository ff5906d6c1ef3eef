"""The labelled examples of an evaluation: how the head of a model reads a table, and what its outputs are judged by."""

from __future__ import annotations

from typing import Any

import torch

from lowrank_compress.calibration.contexts import windows_of
from lowrank_compress.calibration.examples import equally_long, example_batches, grouped
from lowrank_compress.calibration.labelled import (
    Labelled,
    has_labels,
    labelled_batches,
    needs,
    read_labelled,
    slow_tokenizer,
)
from lowrank_compress.calibration.several import marked_batches, read_marked
from lowrank_compress.calibration.sources import Source, read_examples
from lowrank_compress.calibration.tokens import require_known, vocabulary_of
from lowrank_compress.config import EvaluateConfig
from lowrank_compress.errors import InputError
from lowrank_compress.evaluation.answering import Part, of_answers
from lowrank_compress.evaluation.chunks import of_words
from lowrank_compress.evaluation.exam import Exam, of_classes, of_numbers, of_several
from lowrank_compress.model.checkpoint import Checkpoint
from lowrank_compress.model.tasks import NEED_EXAMPLES, Task
from lowrank_compress.stages.reading import SCORED


def exam_of(config: EvaluateConfig, task: Task, tokenizer: Any, checkpoint: Checkpoint, seq_len: int) -> Exam:
    """Read the labelled examples of an evaluation.

    Raises
    ------
    CalibrationError, InputError
        The data cannot be used, a column is not named, or the model has no head that labels are for.
    """
    assert config.classification is not None
    if task not in NEED_EXAMPLES:
        raise InputError("--classification needs a classifier; for a language model use --perplexity.")
    source, size = Source(config.classification, config.text_column, config.label_column), config.batch_size
    if task == "classification":
        if config.label_column is None:
            raise InputError("--classification needs the column of the labels: pass --label-column.")
        examples, vocabulary = read_examples(source, config.limit), vocabulary_of(checkpoint)
        return of_classes(example_batches(tokenizer, examples, checkpoint.class_ids, seq_len, size, vocabulary))
    if not has_labels(task, source):
        if task not in SCORED or config.label_column is None:
            raise InputError(f"--classification needs {needs(task)} for this model's head.")
        batches = marked_batches(
            read_marked(task, source, checkpoint, config.limit), tokenizer, checkpoint, seq_len, size
        )
        return of_several(batches) if task == "labels" else of_numbers(batches)
    labelled = read_labelled(task, source, tokenizer, config.limit)
    if task == "answers":
        return _answers(labelled, tokenizer, checkpoint, seq_len, size)
    numbers = range(len(labelled.examples))
    batches = labelled_batches(task, labelled, numbers, tokenizer, checkpoint, seq_len, size)
    if task == "tokens":
        return of_words(
            batches, {int(number): str(name) for number, name in (checkpoint.config.id2label or {}).items()}
        )
    return of_classes(batches)


def _answers(labelled: Labelled, tokenizer: Any, checkpoint: Checkpoint, seq_len: int, size: int) -> Exam:
    """Read questions with all parts of their texts."""
    if not tokenizer.is_fast:
        raise slow_tokenizer()
    rows, parts = [], []
    for number, example in enumerate(labelled.examples):
        for window in windows_of(example, tokenizer, seq_len):
            require_known(tokenizer, torch.tensor(window.row.ids), vocabulary_of(checkpoint))
            rows.append(window.row)
            parts.append(Part(number, example.context, example.answers, window.places, window.first))
    return of_answers(equally_long(rows, size), [[parts[row] for row in group] for group in grouped(rows, size)])
