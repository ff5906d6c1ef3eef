from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank_compress.errors import InputError, NumericsError
from lowrank_compress.linalg import columns
from lowrank_compress.linalg.columns import compensated_order, elimination_order

laws = settings(deadline=None, max_examples=40, derandomize=True)
seeds = st.integers(0, 2**32 - 1)


def cost_matrix(size: int, rank: int, seed: int) -> np.ndarray:
    sample = np.random.default_rng(seed).normal(size=(rank, size))
    return sample.T @ sample


def cost_of(dropped: set[int], cost: np.ndarray) -> float:
    return sum(cost[i, j] for i in dropped for j in dropped)


@laws
@given(size=st.integers(1, 8), rank=st.integers(1, 8), seed=seeds)
def test_drops_again_and_again_what_costs_least(size: int, rank: int, seed: int) -> None:
    cost = cost_matrix(size, rank, seed)
    order, tail = elimination_order(torch.from_numpy(cost))
    assert order.dtype == torch.int64
    assert tail.dtype == torch.float64
    assert sorted(order.tolist()) == list(range(size))
    assert tail[size] == 0
    worst = 0.0
    for kept in reversed(range(size)):
        dropped = set(order[kept:].tolist())
        before = dropped - {int(order[kept])}
        costs = [cost_of(before | {unit}, cost) for unit in range(size) if unit not in before]
        assert cost_of(dropped, cost) == pytest.approx(min(costs), abs=1e-9)
        worst = max(worst, cost_of(dropped, cost))
        assert tail[kept].item() == pytest.approx(worst, abs=1e-9)
        best = min(cost_of(set(some), cost) for some in itertools.combinations(range(size), size - kept))
        assert tail[kept].item() >= best - 1e-9


@laws
@given(st.lists(st.integers(0, 5), min_size=1, max_size=7))
def test_the_best_units_of_a_diagonal_matrix(scores: list[int]) -> None:
    order, tail = elimination_order(torch.diag(torch.tensor(scores, dtype=torch.float64)))
    assert order.tolist() == sorted(range(len(scores)), key=lambda unit: -scores[unit])
    assert tail.tolist() == [
        min(sum(some) for some in itertools.combinations(scores, len(scores) - kept)) for kept in range(len(scores) + 1)
    ]


def test_units_that_cancel() -> None:
    order, tail = elimination_order(torch.tensor([[4.0, -2, 0], [-2, 1, 0], [0, 0, 9]]))
    assert order.tolist() == [2, 0, 1]
    assert tail.tolist() == [10.0, 1.0, 1.0, 0.0]


def test_costs_that_cannot_be_ordered() -> None:
    with pytest.raises(InputError, match=r"shape \(n, n\), got \(2, 3\)"):
        elimination_order(torch.ones(2, 3))
    with pytest.raises(NumericsError, match="costs of 3 units must be finite, but 1 entries"):
        elimination_order(torch.diag(torch.tensor([1.0, float("nan"), 1.0])))


def layer(units: int, outputs: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights, metric and Gram matrix: decaying spectra, correlated units of unequal size."""
    rng = np.random.default_rng(seed)

    def moment(size: int, decay: float) -> np.ndarray:
        turn = np.linalg.qr(rng.normal(size=(size, size)))[0] * np.arange(1, size + 1) ** (-decay / 2)
        return turn @ turn.T

    scale = np.exp(rng.normal(size=units) * 0.7)
    return rng.normal(size=(outputs, units)), moment(outputs, 1.5), scale[:, None] * moment(units, 1.0) * scale


def compensated_loss(kept: list[int], weight: np.ndarray, form: np.ndarray, gram: np.ndarray) -> float:
    """E‖L (W h − Ŵ h_J)‖² with the regression Ŵ = W C_:J C_JJ⁻¹."""
    error = weight.copy()
    error[:, kept] -= weight @ gram[:, kept] @ np.linalg.inv(gram[np.ix_(kept, kept)])
    return float(np.trace(form @ error @ gram @ error.T))


def ordered(weight: np.ndarray, form: np.ndarray, gram: np.ndarray) -> list[int]:
    values, vectors = np.linalg.eigh(form)
    images = torch.from_numpy(weight.T @ vectors * np.sqrt(values.clip(min=0)))
    before = images.clone()
    inverse = torch.from_numpy(np.linalg.inv(gram))
    # What lies below the diagonal must not matter.
    inverse[np.tril_indices(len(gram), -1)] = torch.nan
    order = compensated_order(images, inverse)
    assert torch.equal(images, before)
    return order.tolist()


@laws
@given(units=st.integers(1, 12), outputs=st.integers(1, 6), seed=seeds)
def test_few_units_are_eliminated_one_by_one_with_compensation(units: int, outputs: int, seed: int) -> None:
    weight, form, gram = layer(units, outputs, seed)
    left, dropped = list(range(units)), []
    while left:
        losses = [compensated_loss([u for u in left if u != unit], weight, form, gram) for unit in left]
        dropped.append(left.pop(int(np.argmin(losses))))
    assert ordered(weight, form, gram) == dropped[::-1]


@pytest.mark.parametrize("panel", [1, 7])
def test_panels_change_nothing(panel: int, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = ordered(*layer(64, 20, 0))
    monkeypatch.setattr(columns, "PANEL", panel)
    assert ordered(*layer(64, 20, 0)) == expected


@pytest.mark.parametrize("largest", [3, 128])
def test_rounds_lose_little_on_elimination_one_by_one(largest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [layer(64, 20, seed) for seed in range(4)]
    monkeypatch.setattr(columns, "LARGEST", largest)
    rounds = [ordered(*case) for case in cases]
    monkeypatch.setattr(columns, "LARGEST", 1)
    single = [ordered(*case) for case in cases]
    for case, fast, slow in zip(cases, rounds, single, strict=True):
        assert sorted(fast) == list(range(64))
        for kept in (10, 20, 32, 48, 56):
            assert compensated_loss(fast[:kept], *case) <= 1.02 * compensated_loss(slow[:kept], *case)


def test_of_equal_units_one_is_kept() -> None:
    """Each alone looks superfluous: scores without compensation within a round would drop both."""
    weight, form, gram = layer(16, 8, 0)
    root = np.linalg.cholesky(gram)
    root[8:] = root[:8]
    gram = root @ root.T + 1e-9 * np.eye(16)
    kept = ordered(weight, form, gram)[:8]
    assert sorted(unit % 8 for unit in kept) == list(range(8))
    assert compensated_loss(kept, weight, form, gram) <= 1e-6 * compensated_loss([], weight, form, gram)
