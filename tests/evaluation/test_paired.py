from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import binom, spearmanr

from lowrank_compress.evaluation.measures import ACCURACY, CHUNKS, of_scores
from lowrank_compress.evaluation.paired import Interval, McNemar, bootstrap, mcnemar, resampled

SIZES = [7.0, 12.0, 12.0, 3.0, 12.0, 9.0]
GAPS = [0.4, -0.2, 1.1, 0.0, 0.7, 0.3]


def slow_bounds(gaps: list[float], sizes: list[float], seed: int, resamples: int, tail: float) -> tuple[float, float]:
    """One draw after the other, one window after the other."""
    generator = np.random.default_rng(seed)
    found = []
    for _ in range(resamples):
        drawn = generator.integers(len(gaps), size=len(gaps))
        found.append(sum(gaps[i] for i in drawn) / sum(sizes[i] for i in drawn))
    found.sort()

    def quantile(share: float) -> float:
        place = share * (resamples - 1)
        low = math.floor(place)
        return found[low] + (place - low) * (found[min(low + 1, resamples - 1)] - found[low])

    return quantile(tail), quantile(1 - tail)


def test_the_interval_is_that_of_single_draws() -> None:
    found = bootstrap(GAPS, SIZES, seed=3, resamples=500, confidence=0.9)
    low, high = slow_bounds(GAPS, SIZES, 3, 500, 0.05)
    assert found == Interval(pytest.approx(sum(GAPS) / sum(SIZES)), pytest.approx(low), pytest.approx(high))
    assert found == bootstrap(GAPS, SIZES, seed=3, resamples=500, confidence=0.9)
    assert found != bootstrap(GAPS, SIZES, seed=4, resamples=500, confidence=0.9)


def test_parts_of_the_draws_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = bootstrap(GAPS, SIZES, seed=1, resamples=333)
    monkeypatch.setattr("lowrank_compress.evaluation.paired._DRAWN", 40)
    assert bootstrap(GAPS, SIZES, seed=1, resamples=333) == whole


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    generator, held = np.random.default_rng(0), 0
    for seed in range(200):
        gaps = generator.normal(0.3, 1.0, 80)
        found = bootstrap(gaps.tolist(), [1.0] * 80, seed=seed, resamples=400, confidence=0.9)
        assert found.low is not None
        assert found.high is not None
        held += found.low <= 0.3 <= found.high
    assert abs(held / 200 - 0.9) < 0.06


SPEARMAN = {"spearman": of_scores(1)["spearman"]}


def test_rank_correlations_are_those_of_single_draws() -> None:
    generator = np.random.default_rng(5)
    scores = generator.integers(0, 4, 12).astype(float)  # with ties
    first, second = (scores + generator.normal(size=12) for _ in range(2))
    one, other = (np.stack([each, scores], 1) for each in (first, second))
    found = resampled(one, other, SPEARMAN, seed=2, resamples=300, confidence=0.8)["spearman"]
    drawing, gaps = np.random.default_rng(2), []
    for _ in range(300):
        drawn = drawing.integers(12, size=12)
        gaps.append(spearmanr(second[drawn], scores[drawn])[0] - spearmanr(first[drawn], scores[drawn])[0])
    low, high = np.quantile(gaps, [0.1, 0.9])
    value = spearmanr(second, scores)[0] - spearmanr(first, scores)[0]
    assert found == Interval(pytest.approx(value), pytest.approx(low), pytest.approx(high))
    assert found.low is not None
    assert found.low < 0 < found.high


def test_draws_that_cannot_be_ranked_are_left_out() -> None:
    one, other = (np.array([[low, 1.0], [high, 2.0]]) for low, high in ((0.1, 0.9), (0.9, 0.1)))
    assert resampled(one, other, SPEARMAN, resamples=200)["spearman"] == Interval(*[pytest.approx(-2.0)] * 3)
    flat = np.array([[0.5, 1.0], [0.5, 2.0]])
    (found,) = resampled(one, flat, SPEARMAN, resamples=200).values()
    assert math.isnan(found.value)
    assert (found.low, found.high) == (None, None)


def slow_f1(draws: list[int], found: list[set[str]], there: list[set[str]]) -> float:
    """F1 of all chunks of the sentences that are drawn."""
    right = sum(len(found[i] & there[i]) for i in draws)
    both = sum(len(found[i]) + len(there[i]) for i in draws)
    return 2 * right / both if both else 0.0


def test_f1_of_chunks_is_that_of_single_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    there = [{"a", "b"}, {"c"}, set(), {"d", "e", "f"}, {"g"}, set()]
    first = [{"a"}, {"c"}, {"x"}, {"d", "e"}, set(), set()]
    second = [{"a", "b"}, {"x"}, set(), {"d"}, {"g", "y"}, {"z"}]
    one, other = (
        np.array([[0, 0, len(a & b), len(a), len(b)] for a, b in zip(said, there, strict=True)], dtype=np.float64)
        for said in (first, second)
    )
    found = resampled(one, other, {"f1": CHUNKS["f1"]}, seed=4, resamples=200, confidence=0.8)["f1"]
    drawing, gaps = np.random.default_rng(4), []
    for _ in range(200):
        drawn = drawing.integers(6, size=6).tolist()
        gaps.append(slow_f1(drawn, second, there) - slow_f1(drawn, first, there))
    low, high = np.quantile(gaps, [0.1, 0.9])
    # 4 of 5 + 7 chunks twice, 4 of 7 + 7 twice.
    assert found == Interval(pytest.approx(8 / 14 - 8 / 12), pytest.approx(low), pytest.approx(high))
    monkeypatch.setattr("lowrank_compress.evaluation.paired._DRAWN", 150)
    assert resampled(one, other, {"f1": CHUNKS["f1"]}, seed=4, resamples=200, confidence=0.8)["f1"] == found


def test_one_window_has_no_interval() -> None:
    assert bootstrap([0.5], [10.0]) == Interval(0.05, None, None)
    one, other = np.array([[1.0, 1.0]]), np.array([[0.0, 1.0]])
    assert resampled(one, other, ACCURACY) == {"accuracy": Interval(-1.0, None, None)}


def test_mcnemar_is_the_tail_of_a_fair_coin() -> None:
    """Two of nine split decisions, or fewer, or as uneven the other way round."""
    first = [True] * 7 + [False] * 2 + [True] * 5 + [False] * 4
    second = [False] * 7 + [True] * 2 + [True] * 5 + [False] * 4
    by_hand = 2 * sum(math.comb(9, k) for k in range(3)) / 2**9
    assert mcnemar(first, second) == McNemar(7, 2, pytest.approx(by_hand))
    assert by_hand == pytest.approx(2 * binom.cdf(2, 9, 0.5))
    assert mcnemar(second, first) == McNemar(2, 7, pytest.approx(by_hand))


def test_mcnemar_where_nothing_is_split() -> None:
    assert mcnemar([True, False], [True, False]) == McNemar(0, 0, 1.0)
    with pytest.raises(ValueError, match="argument"):
        mcnemar([True], [])
