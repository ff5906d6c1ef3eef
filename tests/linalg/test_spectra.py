from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lowrank_compress.errors import InputError, NumericsError
from lowrank_compress.linalg.spectra import (
    effective_rank,
    entropy,
    matrix_entropy,
    matrix_nuclear_norm,
    normalised,
    nuclear_norm,
    nuclear_norm_estimate,
    power_law,
    singular_values,
    stable_rank,
)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (6, 6)])
def test_singular_values_are_those_of_an_svd(shape: tuple[int, int]) -> None:
    matrix = random(*shape)
    torch.testing.assert_close(singular_values(matrix), torch.linalg.svdvals(matrix))


def test_what_is_rounding_is_zero() -> None:
    matrix = random(12, 3) @ random(3, 9, seed=1)
    values = singular_values(matrix.float())
    assert (values[:3] > 0).all()
    assert values[4:].max() < 1e-6 * values[0]
    assert int((singular_values(matrix) > 0).sum()) == 3
    with pytest.raises(NumericsError, match="finite"):
        singular_values(torch.full((2, 2), torch.nan))


def test_ranks_by_hand() -> None:
    values = torch.tensor([4.0, 2.0, 2.0], dtype=torch.float64)
    assert stable_rank(values) == 24 / 16
    assert effective_rank(values) == pytest.approx(2 ** (0.5 * 1 + 2 * 0.25 * 2))
    assert effective_rank(torch.ones(7, dtype=torch.float64)) == pytest.approx(7)
    assert stable_rank(torch.ones(7)) == 7
    zeros = torch.zeros(3)
    assert (stable_rank(zeros), effective_rank(zeros), entropy(zeros)) == (0.0, 0.0, 0.0)


@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=12), st.floats(0.1, 5))
def test_laws_of_ranks(numbers: list[float], factor: float) -> None:
    """1 ≤ stable rank and effective rank ≤ rank, whatever the scale."""
    values = torch.tensor(numbers, dtype=torch.float64)
    for rank in (stable_rank, effective_rank):
        assert 1 - 1e-9 <= rank(values) <= len(numbers) * (1 + 1e-9)
        assert rank(values * factor) == pytest.approx(rank(values))


def slow_power_law(eigenvalues: list[float]) -> tuple[float, float, float]:
    """Every beginning of the tail, every distance, one by one: (α, λ_min, distance)."""
    tail, best = sorted(eigenvalues), (math.nan, math.nan, math.inf)
    for least in tail[:-1]:
        there = [value for value in tail if value >= least]
        alpha = 1 + len(there) / sum(math.log(value / least) for value in there)
        worst = max(
            abs((1 - (value / least) ** (1 - alpha)) - number / len(there)) for number, value in enumerate(there)
        )
        if worst < best[2]:
            best = (alpha, least, worst)
    return best


def test_the_power_law_is_the_nearest_of_all() -> None:
    values = singular_values(random(40, 60))
    found = power_law(values)
    assert found is not None
    alpha, least, distance = slow_power_law(values.square().tolist())
    assert (found.alpha, found.least) == (pytest.approx(alpha), pytest.approx(least))
    assert found.distance == pytest.approx(distance)
    assert found.count == int((values.square() >= least * (1 - 1e-12)).sum())


@pytest.mark.parametrize("alpha", [2.2, 3.5])
def test_the_exponent_of_a_power_law_is_found(alpha: float) -> None:
    """Below the tail the eigenvalues are uniform, which no law of the whole fits."""
    generator = np.random.default_rng(0)
    tail = generator.uniform(size=3000) ** (-1 / (alpha - 1))
    below = generator.uniform(0.0, 1.0, size=2000)
    found = power_law(torch.from_numpy(np.concatenate([tail, below])).sqrt())
    assert found is not None
    assert found.alpha == pytest.approx(alpha, rel=0.06)
    assert found.least == pytest.approx(1, rel=0.25)


def test_where_no_law_can_be_fitted() -> None:
    assert power_law(torch.arange(1.0, 10.0)) is None
    assert power_law(torch.arange(1.0, 11.0)) is not None
    assert power_law(torch.ones(20)) is None
    assert power_law(torch.cat([torch.arange(1.0, 10.0), torch.zeros(20)])) is None


def test_matrix_entropy_is_that_of_the_density_matrix() -> None:
    states = random(30, 12)
    unit = states - states.mean(0)
    unit = unit / unit.norm(dim=1, keepdim=True)
    density = unit.T @ unit / 30
    assert float(density.trace()) == pytest.approx(1)
    values = torch.linalg.eigvalsh(density)
    assert matrix_entropy(states) == pytest.approx(float(-(values * values.log()).sum()))
    # The other Gram matrix, of tokens, has the same eigenvalues.
    assert matrix_entropy(states) == pytest.approx(entropy(torch.linalg.eigvalsh(unit @ unit.T / 30).clamp(min=0)))
    line = torch.arange(6.0)[:, None] * torch.tensor([1.0, 2.0, -1.0])
    assert matrix_entropy(line) == pytest.approx(0, abs=1e-10)
    with pytest.raises(InputError, match="at least two tokens"):
        normalised(random(1, 4))


@given(st.integers(2, 9), st.integers(1, 9), st.integers(0, 50))
def test_the_estimate_is_between_the_norms(rows: int, columns: int, seed: int) -> None:
    """‖X‖_* ≤ Σ of all columns' norms; the largest min(m, n) of them are at least ‖X‖_F's share."""
    matrix = random(rows, columns, seed=seed)
    exact = float(torch.linalg.svdvals(matrix).sum())
    estimate = nuclear_norm_estimate(matrix)
    assert nuclear_norm(matrix) == pytest.approx(exact)
    if columns <= rows:
        assert estimate >= exact * (1 - 1e-9)
    assert estimate <= math.sqrt(min(rows, columns)) * float(matrix.norm()) * (1 + 1e-9)


def test_the_estimate_is_exact_for_orthogonal_columns() -> None:
    basis = torch.linalg.qr(random(9, 4))[0] * torch.tensor([3.0, 1.0, 0.5, 2.0])
    assert nuclear_norm_estimate(basis) == pytest.approx(6.5)
    assert nuclear_norm(basis) == pytest.approx(6.5)


def test_matrix_nuclear_norm_by_columns() -> None:
    states = random(7, 10)
    unit = normalised(states)
    norms = sorted((math.sqrt(sum(float(x) ** 2 for x in column)) for column in unit.T), reverse=True)
    assert matrix_nuclear_norm(states) == pytest.approx(sum(norms[:7]) / 7)
    exact = float(torch.linalg.svdvals(unit).sum()) / 7
    assert matrix_nuclear_norm(states, exact=True) == pytest.approx(exact, rel=1e-6)
