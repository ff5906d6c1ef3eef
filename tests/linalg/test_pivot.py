from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank_compress.errors import InputError, NumericsError
from lowrank_compress.linalg.metric import Identity
from lowrank_compress.linalg.pivot import _exchange, pivot
from lowrank_compress.linalg.weighted import decompose, factors
from tests import reference

laws = settings(deadline=None, max_examples=100, derandomize=True)


def check(left: torch.Tensor, right: torch.Tensor, bound: float) -> None:
    rows, rank = left.shape
    found = pivot(left, right, bound)
    assert found.index.dtype == torch.int64
    assert found.index.tolist() == sorted(set(found.index.tolist()))
    assert found.pivots.shape == (rank, right.shape[1])
    assert found.coefficients.shape == (rows - rank, rank)
    assert found.coefficients.abs().max() <= bound
    product = left.double() @ right.double()
    torch.testing.assert_close(found.rebuild(), product, rtol=0, atol=1e-11 * max(product.norm().item(), 1e-300))


@laws
@given(
    rank=st.integers(1, 8),
    extra=st.integers(1, 12),
    columns=st.integers(1, 12),
    true_rank=st.integers(0, 8),
    decay=st.sampled_from([0.0, 3.0, 8.0]),
    bound=st.sampled_from([1.05, 2.0, 10.0]),
    seed=st.integers(0, 2**32 - 1),
)
def test_pivot_equals_pair(
    rank: int, extra: int, columns: int, true_rank: int, decay: float, bound: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    middle = min(true_rank, rank)
    scale = np.logspace(0, -decay, middle) if middle else np.ones(0)
    left = (rng.normal(size=(rank + extra, middle)) * scale) @ rng.normal(size=(middle, rank))
    check(torch.from_numpy(left), torch.from_numpy(rng.normal(size=(rank, columns))), bound)


@pytest.mark.parametrize("change", ["zero rows", "equal rows", "zero", "zero columns"])
def test_degenerate_factors(change: str) -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(9, 4, generator=generator), torch.randn(4, 6, generator=generator)
    if change == "zero rows":
        left[2:8] = 0
    elif change == "equal rows":
        left[1:] = left[0]
    elif change == "zero":
        left[:] = 0
    else:
        right[:, :5] = 0
    check(left, right, 2.0)


def test_badly_scaled_components() -> None:
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(12, 5, generator=generator, dtype=torch.float64)
    right = torch.randn(5, 8, generator=generator, dtype=torch.float64)
    scale = torch.logspace(-150, 150, 5, dtype=torch.float64)
    check(left * scale, right / scale[:, None], 2.0)


def test_exchanges_repair_what_qr_leaves() -> None:
    """Kahan's matrix: QR with column pivoting exchanges nothing, and its coefficients grow exponentially."""
    size, sine, cosine = 30, 0.8, 0.6
    kahan = np.diag(sine ** np.arange(size)) @ (np.eye(size) - cosine * np.triu(np.ones((size, size)), 1))
    # Later columns are a little shorter, so that rounding cannot change the order.
    kahan *= 1 - 1e-6 * np.arange(size)
    left = kahan[:-1].T
    *_, order = scipy.linalg.qr(left.T, mode="r", pivoting=True)
    assert isinstance(order, np.ndarray)
    assert order.tolist() == list(range(size))
    assert np.abs(reference.express_by_rows(left, order[:-1])).max() > 1e5
    check(torch.from_numpy(left.copy()), torch.eye(size - 1, dtype=torch.float64), 2.0)


def test_updates_during_exchanges_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """If they were not, the solve that follows would find further exchanges to make."""
    solves = []
    orthogonalise = np.linalg.qr
    monkeypatch.setattr(np.linalg, "qr", lambda matrix: solves.append(1) or orthogonalise(matrix))
    rng = np.random.default_rng(0)
    for _ in range(10):
        span, order = rng.normal(size=(40, 10)), np.arange(40)
        found = _exchange(span, order, reference.express_by_rows(span, order[:10]), 1.001)
        np.testing.assert_allclose(found @ span[order[:10]], span[order[10:]], rtol=0, atol=1e-12)
    assert len(solves) == 10


@pytest.mark.parametrize("true_rank", [0, 1, 3])
def test_rows_beyond_the_rank_are_used_by_no_other(true_rank: int) -> None:
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(9, true_rank, generator=generator, dtype=torch.float64)
    mixed = left @ torch.randn(true_rank, 5, generator=generator, dtype=torch.float64)
    found = pivot(mixed, torch.randn(5, 8, generator=generator, dtype=torch.float64))
    assert int(found.coefficients.any(dim=0).sum()) == true_rank


def test_coefficients_are_the_least_squares_ones() -> None:
    generator = torch.Generator().manual_seed(1)
    left, right = torch.randn(9, 4, generator=generator), torch.randn(4, 6, generator=generator)
    found = pivot(left, right)
    expected = reference.express_by_rows((left.double() @ right.double()).numpy(), found.index.numpy())
    np.testing.assert_allclose(found.coefficients.numpy(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)], ids=str)
def test_every_rank_of_a_factored_matrix(shape: tuple[int, int]) -> None:
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(2))
    narrow = weight if shape[0] <= shape[1] else weight.mT
    projector = decompose(Identity().form(narrow), Identity())
    for rank in range(1, min(shape)):
        check(*factors(weight, projector, rank), 2.0)


def test_same_input_same_bytes() -> None:
    left, right = torch.randn(9, 4), torch.randn(4, 6)
    first, second = pivot(left, right), pivot(left, right)
    assert torch.equal(first.index, second.index)
    assert torch.equal(first.coefficients, second.coefficients)


def test_impossible_questions() -> None:
    with pytest.raises(InputError, match=r"got rank 4 and 4 rows. Store it dense"):
        pivot(torch.ones(4, 4), torch.ones(4, 4))
    with pytest.raises(InputError, match=r"got rank 0 and 4 rows"):
        pivot(torch.ones(4, 0), torch.ones(0, 4))
    with pytest.raises(InputError, match=r"got \(4, 2\) and \(3, 4\)"):
        pivot(torch.ones(4, 2), torch.ones(3, 4))
    with pytest.raises(InputError, match=r"must exceed 1, got 1"):
        pivot(torch.ones(4, 2), torch.ones(2, 4), bound=1)
    with pytest.raises(NumericsError, match=r"finite factors of a matrix of shape \(4, 5\)"):
        pivot(torch.full((4, 2), torch.nan), torch.ones(2, 5))
