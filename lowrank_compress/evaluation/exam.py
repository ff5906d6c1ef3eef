"""Labelled examples that models are measured on: what they read, and what their outputs are worth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lowrank_compress.errors import NumericsError
from lowrank_compress.evaluation.measures import ACCURACY, Measures, Rows, of_labels, of_scores
from lowrank_compress.evaluation.replayed import walked
from lowrank_compress.model.skeleton import Skeleton
from lowrank_compress.model.walk.batch import IGNORED, Batch


@dataclass(frozen=True)
class Exam:
    """Examples and how outputs are judged.

    Attributes
    ----------
    batches
        What a model reads.
    judge
        The number of a batch and the outputs of it -> (sequences or pairs, width) float64.
    width
        Columns of that.
    measures
        Of the rows of examples.
    examples
        Makes rows of examples of those of all sequences, where an example may be several.
    unit
        What is counted: "examples", "words".
    parts
        Of which example each sequence is; None where each is one of its own.
    """

    batches: Sequence[Batch]
    judge: Callable[[int, Tensor], Rows]
    width: int
    measures: Measures
    examples: Callable[[Rows], Rows] = lambda rows: rows
    unit: str = "examples"
    parts: Sequence[int] | None = None

    def count(self, rows: Rows) -> int:
        """How many examples, or words, are measured."""
        return int(rows[:, 1].sum()) if self.unit == "words" else len(rows)


def examined(
    skeleton: Skeleton,
    exam: Exam,
    advance: Callable[[int, int], None] = lambda done, total: None,
    part: slice = slice(None),
) -> Rows:
    """Have a model read the examples, and judge it.

    Parameters
    ----------
    part
        Which batches to read; the rows of others are zeros.

    Returns
    -------
    numpy.ndarray
        Rows of sequences (or pairs), in the order of batches: `Exam.examples` makes rows of examples of them.

    Raises
    ------
    NumericsError
        An output is NaN or infinite.
    """
    sizes = [len(batch.ids) >> batch.paired for batch in exam.batches]
    starts = np.cumsum([0, *sizes])
    rows = np.zeros((starts[-1], exam.width))
    numbers = iter(range(len(exam.batches))[part])
    for walk in walked(skeleton, exam.batches[part], advance):
        for number in range(len(walk.batches)):
            with torch.no_grad():
                outputs = walk.head(number, walk.leaving(number))
            if not torch.isfinite(outputs).all():
                raise NumericsError(
                    "The model gave NaN or infinite logits on the labelled examples. Check the checkpoint."
                )
            place = next(numbers)
            rows[starts[place] : starts[place + 1]] = exam.judge(place, outputs.cpu())
    return rows


def of_classes(batches: Sequence[Batch]) -> Exam:
    """Count what has its largest logit where its label says: texts, or preferred ones of pairs."""

    def judge(number: int, outputs: Tensor) -> Rows:
        right = (outputs.argmax(-1) == _labels(batches[number])).double()
        return torch.stack([right, torch.ones_like(right)], 1).numpy()

    return Exam(batches, judge, 2, ACCURACY)


def of_numbers(batches: Sequence[Batch]) -> Exam:
    """Hold the scores of texts against the numbers they should be."""
    scores = batches[0].outputs

    def judge(number: int, outputs: Tensor) -> Rows:
        return torch.cat([outputs.double(), _labels(batches[number])], 1).numpy()

    return Exam(batches, judge, 2 * scores, of_scores(scores))


def of_several(batches: Sequence[Batch]) -> Exam:
    """Count labels that apply and those that are said to, with a probability above one half."""
    labels = batches[0].outputs

    def judge(number: int, outputs: Tensor) -> Rows:
        found, there = outputs > 0, _labels(batches[number]) > 0
        exact = (found == there).all(1, keepdim=True)
        return torch.cat([found & there, found, there, exact, torch.ones_like(exact)], 1).double().numpy()

    return Exam(batches, judge, 3 * labels + 2, of_labels(labels))


def scored_places(batch: Batch) -> Tensor:
    """Which tokens have a label, (sequences, length) bool."""
    return _labels(batch) != IGNORED


def _labels(batch: Batch) -> Tensor:
    assert batch.labels is not None
    return batch.labels
