"""Measures of labelled examples, each a function of numbers that every example has, so that examples can be drawn anew.

Rows are (…, examples, columns) float64; a measure is one number for each set of rows, nan where there is none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

Rows = NDArray[np.float64]
Measure = Callable[[Rows], Rows]
Measures = Mapping[str, Measure]
"""By name; the first is the one to tell where one is told."""


def share(column: int, of: int) -> Measure:
    """Make the measure Σ column / Σ of."""
    return lambda rows: _divided(rows[..., column].sum(-1), rows[..., of].sum(-1))


ACCURACY: Measures = {"accuracy": share(0, 1)}
"""Of rows (right, all)."""

CHUNKS: Measures = {
    "f1": lambda rows: _f1(rows[..., 2:].sum(-2)),
    "precision": share(2, 3),
    "recall": share(2, 4),
    "accuracy": share(0, 1),
}
"""Of rows (words that are right, words, chunks that are right, chunks that are found, chunks that there are)."""

ANSWERS: Measures = {"f1": share(1, 2), "exact_match": share(0, 2)}
"""Of rows (exact match, F1, 1)."""

RIGHT = ("accuracy", "exact_match")
"""Measures that are a share of what is right."""


def of_scores(scores: int) -> Measures:
    """Make the measures of rows (scores …, numbers that are said …): means over the scores."""

    def correlation(of: Callable[[Rows], Rows]) -> Measure:
        return lambda rows: _correlation(of(rows[..., :scores]), of(rows[..., scores:])).mean(-1)

    return {
        "pearson": correlation(lambda values: values),
        "spearman": correlation(lambda values: rankdata(values, axis=-2)),
        "mse": lambda rows: ((rows[..., :scores] - rows[..., scores:]) ** 2).mean((-2, -1)),
    }


def of_labels(labels: int) -> Measures:
    """Make the measures of rows (right …, found …, there …, exact match, 1), the first three for each label.

    F1 is 0 where a label is neither found nor there. ``f1_micro`` is of all labels together, ``f1_macro`` the mean.
    """

    def counts(rows: Rows) -> Rows:  # (…, labels, 3)
        sums = rows[..., : 3 * labels].sum(-2)
        return np.moveaxis(sums.reshape(*sums.shape[:-1], 3, labels), -1, -2)

    return {
        "f1_micro": lambda rows: _f1(counts(rows).sum(-2)),
        "f1_macro": lambda rows: _f1(counts(rows)).mean(-1),
        "exact_match": share(3 * labels, 3 * labels + 1),
    }


def _f1(counts: Rows) -> Rows:
    """F1 of (…, 3): how many are right, found, and there."""
    return _divided(2 * counts[..., 0], counts[..., 1] + counts[..., 2])


def _divided(one: Rows, other: Rows) -> Rows:
    """Divide; 0 where there is nothing to divide by, as no chunk is found or none is there."""
    return np.divide(one, other, out=np.zeros_like(np.asarray(one, dtype=np.float64)), where=np.asarray(other) > 0)


def _correlation(one: Rows, other: Rows) -> Rows:
    """Pearson's correlation of each column (…, examples, columns) with the same of the other; nan where constant."""
    one, other = (part - part.mean(-2, keepdims=True) for part in (one, other))
    norms = np.sqrt((one**2).sum(-2) * (other**2).sum(-2))
    with np.errstate(invalid="ignore", divide="ignore"):
        return (one * other).sum(-2) / norms
