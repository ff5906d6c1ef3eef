from __future__ import annotations

import numpy as np
import pytest
import torch

from lowrank_compress.errors import InputError, NumericsError
from lowrank_compress.linalg import eigen


def spectrum_matrix(values: torch.Tensor, seed: int = 0) -> torch.Tensor:
    gaussian = torch.randn(len(values), len(values), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    vectors = torch.linalg.qr(gaussian).Q
    return vectors * values @ vectors.mT


@pytest.mark.parametrize("keep", [None, 1, 7, 20, 99])
def test_decomposition(keep: int | None) -> None:
    matrix = spectrum_matrix(torch.linspace(1, 20, 20, dtype=torch.float64))
    values, vectors = eigen.eigh(matrix, keep)
    count = min(keep or 20, 20)
    assert values.shape == (count,)
    assert vectors.shape == (20, count)
    assert torch.all(values.diff() <= 0)
    torch.testing.assert_close(values, torch.arange(20, 20 - count, -1, dtype=torch.float64))
    torch.testing.assert_close(matrix @ vectors, vectors * values)
    torch.testing.assert_close(vectors.mT @ vectors, torch.eye(count, dtype=torch.float64))
    assert torch.all(vectors.gather(0, vectors.abs().argmax(dim=0)[None]) > 0)


@pytest.mark.parametrize("keep", [70, 200, 300])
@pytest.mark.parametrize("true_rank", [300, 40], ids=["full rank", "rank below what is kept"])
def test_every_routine_gives_the_same(true_rank: int, keep: int, monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.zeros(300, dtype=torch.float64)
    values[:true_rank] = torch.logspace(0, -5, true_rank, dtype=torch.float64)
    matrix = spectrum_matrix(values)
    assert eigen.LAPACK_SIZE <= 300
    with monkeypatch.context() as patch:
        patch.setattr(torch.linalg, "eigh", None)
        part_values, part_vectors = eigen.eigh(matrix, keep)
    monkeypatch.setattr(eigen, "LAPACK_SIZE", 1000)
    full_values, full_vectors = eigen.eigh(matrix)
    assert part_vectors.shape == (300, keep)
    torch.testing.assert_close(part_values, full_values[:keep], rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(part_vectors.mT @ part_vectors, torch.eye(keep, dtype=torch.float64))
    # Compared over gaps: inside the null space any basis is right.
    count = min(true_rank, keep)
    torch.testing.assert_close(part_vectors[:, :count], full_vectors[:, :count], rtol=1e-7, atol=1e-9)


def test_one_triangle_is_read_and_the_input_is_left_alone() -> None:
    for size in (20, 300):
        matrix = spectrum_matrix(torch.linspace(1, size, size, dtype=torch.float64))
        given = matrix.triu() + torch.randn(size, size, dtype=torch.float64).tril(-1)
        before = given.clone()
        for keep in (None, 10):
            values, _ = eigen.eigh(given, keep)
            torch.testing.assert_close(values, torch.linspace(size, 1, size, dtype=torch.float64)[: len(values)])
        assert torch.equal(given, before)


def test_rounding_below_zero_is_zero() -> None:
    values, _ = eigen.eigh(torch.diag(torch.tensor([1.0, -1e-9])))
    assert values.tolist() == [1.0, 0.0]


def test_float32_is_decomposed_in_float64() -> None:
    values, vectors = eigen.eigh(torch.eye(3, dtype=torch.float32))
    assert values.dtype == vectors.dtype == torch.float64


@pytest.mark.parametrize("keep", [None, 10])
def test_not_finite(keep: int | None) -> None:
    matrix = torch.eye(300)
    matrix[2, 3] = float("nan")
    with pytest.raises(NumericsError, match="Expected a finite 300x300 matrix"):
        eigen.eigh(matrix, keep)


def test_failure_of_the_routine(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "eigh", fail)
    with pytest.raises(NumericsError, match=r"3x3 matrix failed \(did not converge\)"):
        eigen.eigh(torch.eye(3))


def test_failure_of_lapack(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise np.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(eigen, "largest_eigenpairs", fail)
    with pytest.raises(NumericsError, match=r"300x300 matrix failed \(did not converge\)"):
        eigen.eigh(torch.eye(300), 10)


def test_impossible_questions() -> None:
    with pytest.raises(InputError, match=r"shape \(k, k\), got \(2, 3\)"):
        eigen.eigh(torch.ones(2, 3))
    with pytest.raises(InputError, match="at least 1, got 0"):
        eigen.eigh(torch.eye(2), 0)
