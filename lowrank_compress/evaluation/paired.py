"""Whether two models that were measured on the same windows or questions differ, or only seem to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest, rankdata

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
    value = float(gaps.sum() / sizes.sum())
    if len(gaps) < 2:
        return Interval(value, None, None)
    generator = np.random.default_rng(seed)
    means = []
    rows = max(1, _DRAWN // len(gaps))
    for start in range(0, resamples, rows):
        drawn = generator.integers(len(gaps), size=(min(rows, resamples - start), len(gaps)))
        means.append(gaps[drawn].sum(1) / sizes[drawn].sum(1))
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    return Interval(value, float(low), float(high))


def ranked(
    first: Sequence[float],
    second: Sequence[float],
    scores: Sequence[float],
    *,
    seed: int = 0,
    resamples: int = 10_000,
    confidence: float = 0.95,
) -> Interval:
    """Estimate how much more Spearman's ρ with scores a second list has than a first one, and its interval.

    Pairs of texts are drawn as windows are in `bootstrap`, for both models the same. Draws in which nothing can be
    ranked, as all of one list is equal, are left out.

    Parameters
    ----------
    first, second
        Of each pair: how similar its texts are, by each of the two models.
    scores
        How similar they are said to be.
    seed, resamples, confidence
        As of `bootstrap`.

    Returns
    -------
    Interval
        Without bounds where nothing can be ranked in any draw.
    """
    lists = np.asarray([first, second, scores], dtype=np.float64)
    count = lists.shape[1]
    one, other = _correlations(lists[:, None])
    generator = np.random.default_rng(seed)
    found = []
    rows = max(1, _DRAWN // (4 * count))
    for start in range(0, resamples, rows):
        drawn = generator.integers(count, size=(min(rows, resamples - start), count))
        left, right = _correlations(lists[:, drawn])
        found.append(right - left)
    gaps = np.concatenate(found)
    gaps = gaps[np.isfinite(gaps)]
    value = float(other[0] - one[0])
    if not len(gaps):
        return Interval(value, None, None)
    tail = (1 - confidence) / 2
    low, high = np.quantile(gaps, [tail, 1 - tail])
    return Interval(value, float(low), float(high))


def _correlations(lists: NDArray[np.float64]) -> NDArray[np.float64]:
    """Spearman's ρ of the first two of three lists (3, draws, pairs) with the last, (2, draws); nan where constant."""
    ranks = rankdata(lists, axis=-1)
    ranks -= ranks.mean(-1, keepdims=True)
    norms = np.sqrt((ranks**2).sum(-1))
    with np.errstate(invalid="ignore"):
        return (ranks[:2] * ranks[2]).sum(-1) / (norms[:2] * norms[2])


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
