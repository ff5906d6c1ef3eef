from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from lowrank_compress.linalg import lapack

SIZE = 120


def matrices() -> dict[str, np.ndarray]:
    """Spectra that are hard for one method or another."""
    generator = np.random.default_rng(0)
    vectors = np.linalg.qr(generator.standard_normal((SIZE, SIZE)))[0]

    def of(values: np.ndarray) -> np.ndarray:
        matrix = vectors * values @ vectors.T
        return (matrix + matrix.T) / 2

    steps = np.arange(SIZE)
    wilkinson = np.diag(np.abs(steps - SIZE / 2)) + np.diag(np.ones(SIZE - 1), 1) + np.diag(np.ones(SIZE - 1), -1)
    return {
        "flat": of(1 + steps / SIZE),
        "graded": of(10.0 ** (-steps / 6)),
        "rank deficient": of(np.where(steps < 30, 1.0 + steps, 0.0)),
        "one cluster": of(np.where(steps < 60, 1.0, 1e-3)),
        "outlier": of(np.where(steps == 0, 1e8, 1.0 + steps)),
        "wilkinson": wilkinson,
        "identity": np.eye(SIZE),
        "zero": np.zeros((SIZE, SIZE)),
        "one element": np.array([[3.0]]),
    }


@pytest.mark.parametrize("keep", [1, 35, 59, 61, 119, SIZE])
@pytest.mark.parametrize("name", list(matrices()))
def test_largest_eigenpairs(name: str, keep: int) -> None:
    matrix = matrices()[name]
    keep = min(keep, len(matrix))
    values, vectors = lapack.largest_eigenpairs(matrix.copy(order="F"), keep)
    scale = max(np.abs(matrix).max(), 1e-300)
    np.testing.assert_allclose(values, np.linalg.eigvalsh(matrix)[-keep:], rtol=0, atol=1e-13 * SIZE * scale)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(keep), atol=1e-11)
    np.testing.assert_allclose(matrix @ vectors, vectors * values, rtol=0, atol=1e-13 * SIZE * scale)


@pytest.mark.parametrize("block", [1, 7, 119, 128])
def test_any_number_of_reflections_at_once(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = matrices()["flat"]
    expected = lapack.largest_eigenpairs(matrix.copy(order="F"), 40)
    monkeypatch.setattr(lapack, "BLOCK", block)
    found = lapack.largest_eigenpairs(matrix.copy(order="F"), 40)
    for one, other in zip(expected, found, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-14)


def test_the_lower_triangle_is_read() -> None:
    matrix = matrices()["flat"]
    expected = lapack.largest_eigenpairs(matrix.copy(order="F"), 20)
    found = lapack.largest_eigenpairs(np.asfortranarray(np.tril(matrix)), 20)
    for one, other in zip(expected, found, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("name", ["flat", "graded", "rank deficient", "outlier", "one element"])
def test_congruence(name: str) -> None:
    form = matrices()[name]
    size = len(form)
    triangle = np.tril(np.random.default_rng(1).standard_normal((size, size))) + 2 * np.eye(size)
    found, lower = np.asfortranarray(np.tril(form)), np.asfortranarray(triangle + np.triu(np.ones((size, size)), 1))
    lapack.congruence(found, lower)
    expected = triangle.T @ form @ triangle
    np.testing.assert_allclose(np.tril(found), np.tril(expected), rtol=0, atol=1e-13 * np.abs(expected).max())


def test_threads_find_the_same_bits() -> None:
    matrix = matrices()["graded"]

    def pairs(keep: int) -> list[np.ndarray]:
        return list(lapack.largest_eigenpairs(matrix.copy(order="F"), keep))

    keeps = [20, 40, 80, 120] * 4
    with ThreadPoolExecutor(4) as pool:
        for keep, found in zip(keeps, pool.map(pairs, keeps), strict=True):
            for one, other in zip(pairs(keep), found, strict=True):
                np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("routine", ["_DSYTRD", "_DSTEMR"])
def test_a_code_is_an_error(routine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> None:
        arguments[-1]._obj.value = 3  # info, by its address

    monkeypatch.setattr(lapack, routine, fail)
    with pytest.raises(np.linalg.LinAlgError, match="returned the code 3"):
        lapack.largest_eigenpairs(np.eye(3, order="F"), 2)
