"""Whether two models that were measured on the same windows or examples differ, or only seem to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest

from lowrank_compress.evaluation.measures import Measures, Rows

# Draws of windows in memory at once.
_DRAWN = 1 << 22


@dataclass(frozen=True)
class Interval:
    """A value and, where there are windows to draw from, the bounds of its confidence interval."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class McNemar:
    """Questions that only one of two models has right, and how probable a split as uneven is if both are equally good.

    Attributes
    ----------
    only_first, only_second
        Questions that only this model has right.
    p_value
        Two-sided and exact: of a binomial distribution with probability ½.
    """

    only_first: int
    only_second: int
    p_value: float


def bootstrap(
    differences: Sequence[float],
    weights: Sequence[float],
    *,
    seed: int = 0,
    resamples: int = 10_000,
    confidence: float = 0.95,
) -> Interval:
    """Estimate Σ differences / Σ weights and its confidence interval, from windows drawn with replacement.

    Windows of a text are drawn, not tokens, which depend on each other; and both models' values of a window are drawn
    together, so that what makes a window hard for both cancels out. The bounds are percentiles (B. Efron, R. J.
    Tibshirani, An Introduction to the Bootstrap, 1993, section 13.3; for pairs P. Koehn, EMNLP 2004).

    Parameters
    ----------
    differences
        Of each window: what the second model has more than the first, summed over its tokens.
    weights
        Its tokens.
    seed
        Of the draws.
    resamples
        How many draws of as many windows as there are.
    confidence
        Probability of the interval.

    Returns
    -------
    Interval
        Without bounds where there is a single window.
    """
    gaps, sizes = np.asarray(differences, dtype=np.float64), np.asarray(weights, dtype=np.float64)
    generator = np.random.default_rng(seed)
    means = []
    rows = max(1, _DRAWN // len(gaps))
    for start in range(0, resamples if len(gaps) > 1 else 0, rows):
        drawn = generator.integers(len(gaps), size=(min(rows, resamples - start), len(gaps)))
        means.append(gaps[drawn].sum(1) / sizes[drawn].sum(1))
    return _interval(float(gaps.sum() / sizes.sum()), means, confidence)


def resampled(
    first: Rows,
    second: Rows,
    measures: Measures,
    *,
    seed: int = 0,
    resamples: int = 10_000,
    confidence: float = 0.95,
) -> dict[str, Interval]:
    """Estimate how much more of each measure a second model has than a first one, and its confidence interval.

    Examples are drawn as windows are in `bootstrap`, for both models the same. Draws in which a measure is no number,
    as nothing can be ranked where all of one list is equal, are left out.

    Parameters
    ----------
    first, second
        What the measures are of, (examples, columns) of each of the two models.
    measures
        By name.
    seed, resamples, confidence
        As of `bootstrap`.

    Returns
    -------
    dict
        By name; without bounds where there is a single example, or a measure is no number in any draw.
    """
    count = len(first)
    found: dict[str, list[Rows]] = {name: [] for name in measures}
    generator = np.random.default_rng(seed)
    rows = max(1, _DRAWN // (2 * first.size))
    for start in range(0, resamples if count > 1 else 0, rows):
        drawn = generator.integers(count, size=(min(rows, resamples - start), count))
        one, other = first[drawn], second[drawn]
        for name, measure in measures.items():
            found[name].append(measure(other) - measure(one))
    values = {name: float(measure(second) - measure(first)) for name, measure in measures.items()}
    return {name: _interval(value, found[name], confidence) for name, value in values.items()}


def _interval(value: float, drawn: Sequence[Rows], confidence: float) -> Interval:
    """Take the bounds of what was found in draws, numbers alone."""
    every = np.concatenate(drawn) if drawn else np.empty(0)
    every = every[np.isfinite(every)]
    if not len(every):
        return Interval(value, None, None)
    tail = (1 - confidence) / 2
    low, high = np.quantile(every, [tail, 1 - tail])
    return Interval(value, float(low), float(high))


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> McNemar:
    """Test whether two models answer the same questions equally well.

    Questions that both or neither have right say nothing of the difference; of the others each is as likely to be the
    first one's as the second one's if the models are equally good (Q. McNemar, Psychometrika 12, 1947; the exact test).

    Parameters
    ----------
    first, second
        Whether a model has each question right.
    """
    pairs = list(zip(first, second, strict=True))
    only_first = sum(one and not other for one, other in pairs)
    only_second = sum(other and not one for one, other in pairs)
    decided = only_first + only_second
    p_value = float(binomtest(min(only_first, only_second), decided).pvalue) if decided else 1.0
    return McNemar(only_first, only_second, p_value)
