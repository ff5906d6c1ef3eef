from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank_compress.errors import InputError
from lowrank_compress.linalg.metric import Diagonal, Full, Identity, Metric, TriangularRoot
from lowrank_compress.linalg.weighted import Projector, decompose, factors, smaller_side
from tests import reference

STRUCTURES = ("identity", "diagonal", "full")
PAIRS = list(itertools.product(STRUCTURES, STRUCTURES))
laws = settings(deadline=None, max_examples=25, derandomize=True)
shapes = st.tuples(st.integers(1, 9), st.integers(1, 9))
seeds = st.integers(0, 2**32 - 1)


@dataclass
class Problem:
    """W with its metrics, and what the metrics are as dense matrices: the near one damped, the far one not."""

    weight: np.ndarray
    output: Metric
    inputs: Metric
    dense_output: np.ndarray
    dense_inputs: np.ndarray

    def solve(self, keep: int | None = None) -> Projector:
        weight = torch.from_numpy(self.weight)
        if smaller_side(self.weight.shape) == "out":
            return decompose(self.inputs.form(weight), self.output, keep)
        return decompose(self.output.form(weight.mT), self.inputs, keep)

    def approximation(self, projector: Projector, rank: int) -> np.ndarray:
        a, b = factors(torch.from_numpy(self.weight), projector, rank)
        assert a.shape == (self.weight.shape[0], rank)
        assert b.shape == (rank, self.weight.shape[1])
        return (a @ b).numpy()

    def loss(self, approximation: np.ndarray) -> float:
        return reference.metric_loss(self.weight - approximation, self.dense_output, self.dense_inputs)


def metric(structure: str, size: int, tokens: int, shrinkage: float, rng: np.random.Generator) -> Metric:
    if structure == "identity":
        return Identity()
    if structure == "diagonal":
        return Diagonal(torch.from_numpy(rng.uniform(0.1, 3, size)), shrinkage)
    sample = rng.normal(size=(tokens, size))
    return Full(torch.from_numpy(sample.T @ sample / tokens), shrinkage)


def dense(structure: Metric, size: int, damped: bool) -> np.ndarray:
    if isinstance(structure, Identity):
        return np.eye(size)
    matrix = structure.moment.numpy() if isinstance(structure, Full) else np.diag(structure.weights.numpy())
    return reference.damp(matrix, structure.shrinkage) if damped else matrix


def problem(
    shape: tuple[int, int],
    pair: tuple[str, str],
    seed: int,
    tokens: tuple[int, int] = (40, 40),
    shrinkage: float = 1e-2,
) -> Problem:
    rng = np.random.default_rng(seed)
    output, inputs = (metric(pair[side], shape[side], tokens[side], shrinkage, rng) for side in (0, 1))
    near_is_output = smaller_side(shape) == "out"
    return Problem(
        rng.normal(size=shape),
        output,
        inputs,
        dense(output, shape[0], near_is_output),
        dense(inputs, shape[1], not near_is_output),
    )


def gap(tail: np.ndarray, rank: int) -> float:
    """How well rank r is separated, relative to all: the approximation is unique only where it is."""
    values = -np.diff(tail)
    return 1.0 if rank in (0, len(values)) else (values[rank - 1] - values[rank]) / tail[0]


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
@laws
@given(shape=shapes, seed=seeds)
def test_equals_the_svd_of_the_weighted_matrix(pair: tuple[str, str], shape: tuple[int, int], seed: int) -> None:
    case = problem(shape, pair, seed)
    projector = case.solve()
    tail = reference.weighted_tail(case.weight, case.dense_output, case.dense_inputs)
    np.testing.assert_allclose(projector.tail().numpy(), tail, rtol=0, atol=1e-11 * tail[0])
    for rank in range(min(shape) + 1):
        found = case.approximation(projector, rank)
        assert case.loss(found) == pytest.approx(tail[rank], rel=0, abs=1e-11 * tail[0])
        if gap(tail, rank) > 1e-3:
            expected = reference.weighted_svd(case.weight, case.dense_output, case.dense_inputs, rank)
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-10 * np.linalg.norm(case.weight))


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
@laws
@given(shape=shapes, seed=seeds)
def test_loss_falls_to_exactly_nothing(pair: tuple[str, str], shape: tuple[int, int], seed: int) -> None:
    case = problem(shape, pair, seed)
    projector = case.solve()
    tail = projector.tail()
    assert torch.all(tail.diff() <= 0)
    assert tail[-1] == 0
    np.testing.assert_allclose(
        case.approximation(projector, min(shape)), case.weight, rtol=0, atol=1e-12 * np.linalg.norm(case.weight)
    )


@pytest.mark.parametrize("shape", [(4, 9), (6, 6), (9, 4)], ids=str)
@laws
@given(seed=seeds, tokens=st.integers(1, 5))
def test_fewer_tokens_than_dimensions(shape: tuple[int, int], seed: int, tokens: int) -> None:
    case = problem(shape, ("full", "full"), seed, tokens=(tokens, tokens))
    projector = case.solve()
    tail = reference.weighted_tail(case.weight, case.dense_output, case.dense_inputs)
    np.testing.assert_allclose(projector.tail().numpy(), tail, rtol=0, atol=1e-11 * tail[0])
    for rank in range(min(shape) + 1):
        assert case.loss(case.approximation(projector, rank)) == pytest.approx(tail[rank], rel=0, abs=1e-11 * tail[0])
    # The weight is not restricted to what the sample happened to span.
    np.testing.assert_allclose(case.approximation(projector, min(shape)), case.weight, rtol=0, atol=1e-10)


@pytest.mark.parametrize("shape", [(4, 9), (9, 4)], ids=str)
def test_rank_deficient_near_metric_without_shrinkage(shape: tuple[int, int]) -> None:
    case = problem(shape, ("full", "full"), 0, tokens=(2, 2), shrinkage=0.0)
    projector = case.solve()
    np.testing.assert_allclose(case.approximation(projector, 4), case.weight, rtol=0, atol=1e-6)
    tail = reference.weighted_tail(case.weight, case.dense_output, case.dense_inputs)
    for rank in range(5):
        assert case.loss(case.approximation(projector, rank)) == pytest.approx(tail[rank], rel=0, abs=1e-6 * tail[0])


@pytest.mark.parametrize("shape", [(5, 7), (7, 5)], ids=str)
@pytest.mark.parametrize("keep", [1, 3, 5, 50])
def test_keeping_a_part_changes_nothing_but_the_length(shape: tuple[int, int], keep: int) -> None:
    case = problem(shape, ("full", "full"), 1)
    part, full = case.solve(keep), case.solve()
    kept = min(keep, 5)
    assert part.expand.shape == (5, kept)
    assert part.contract.shape == (kept, 5)
    torch.testing.assert_close(part.tail(), full.tail()[: kept + 1], rtol=1e-12, atol=1e-12 * full.total)
    np.testing.assert_allclose(case.approximation(part, kept), case.approximation(full, kept), rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(3, 5), (5, 3)], ids=str)
def test_no_local_search_does_better(shape: tuple[int, int]) -> None:
    case = problem(shape, ("full", "full"), 2)
    best = case.solve().tail()[2].item()
    for seed in range(3):
        found = reference.alternating_least_squares(
            case.weight, case.dense_output, case.dense_inputs, 2, 200, np.random.default_rng(seed)
        )
        assert case.loss(found) >= best * (1 - 1e-9)
        assert case.loss(found) == pytest.approx(best, rel=1e-4)


@pytest.mark.parametrize("shape", [(5, 7), (6, 6), (7, 5)], ids=str)
def test_no_metric_is_beaten_in_itself(shape: tuple[int, int]) -> None:
    cases = [problem(shape, pair, 3) for pair in PAIRS]
    for case in cases:
        case.weight = cases[0].weight
    projectors = [case.solve() for case in cases]
    for rank in (1, 3):
        found = [case.approximation(projector, rank) for case, projector in zip(cases, projectors, strict=True)]
        for case, own in zip(cases, found, strict=True):
            assert all(case.loss(own) <= case.loss(other) * (1 + 1e-12) for other in found)


@laws
@given(shape=shapes, seed=seeds)
def test_the_choice_of_root_does_not_matter(shape: tuple[int, int], seed: int) -> None:
    case = problem(shape, ("full", "full"), seed)
    near = case.dense_output if smaller_side(shape) == "out" else case.dense_inputs

    class Symmetric:
        """Another root, C = S: its transpose and inverse are spelled out."""

        def root(self) -> TriangularRoot:
            return Symmetric.Root(torch.from_numpy(reference.square_root(near)))

        class Root(TriangularRoot):
            def congruence(self, form: torch.Tensor) -> torch.Tensor:
                return self.lower.mT @ form @ self.lower

            def expand(self, vectors: torch.Tensor) -> torch.Tensor:
                return torch.linalg.solve(self.lower.mT, vectors)

    weight = torch.from_numpy(case.weight)
    form = case.inputs.form(weight) if smaller_side(shape) == "out" else case.output.form(weight.mT)
    projector, other = case.solve(), decompose(form, cast(Metric, Symmetric()))
    torch.testing.assert_close(projector.tail(), other.tail(), rtol=0, atol=1e-11 * projector.total)
    for rank in range(min(shape) + 1):
        if gap(projector.tail().numpy(), rank) > 1e-3:
            np.testing.assert_allclose(
                case.approximation(projector, rank), case.approximation(other, rank), rtol=0, atol=1e-10
            )


@pytest.mark.parametrize("shape", [(4, 6), (6, 4)], ids=str)
def test_a_moment_of_outputs_does_the_same_as_the_form(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    weight = rng.normal(size=shape)
    rows, columns = rng.normal(size=(30, shape[0])), rng.normal(size=(30, shape[1]))
    case = Problem(
        weight,
        Full(torch.from_numpy(rows.T @ rows / 30), 1e-3),
        Full(torch.from_numpy(columns.T @ columns / 30), 1e-3),
        np.eye(0),
        np.eye(0),
    )
    seen = columns @ weight.T if smaller_side(shape) == "out" else rows @ weight
    near = case.output if smaller_side(shape) == "out" else case.inputs
    moment = decompose(torch.from_numpy(seen.T @ seen / 30), near)
    torch.testing.assert_close(moment.tail(), case.solve().tail())


@laws
@given(shape=shapes, seed=seeds)
def test_projections_are_projections(shape: tuple[int, int], seed: int) -> None:
    projector = problem(shape, ("full", "full"), seed).solve()
    eye = torch.eye(min(shape), dtype=torch.float64)
    torch.testing.assert_close(projector.contract @ projector.expand, eye, rtol=0, atol=1e-10)


@pytest.mark.parametrize("shape", [(4, 6), (6, 4)], ids=str)
def test_factors_are_balanced(shape: tuple[int, int]) -> None:
    case = problem(shape, ("full", "full"), 4)
    case.weight *= 1e6
    a, b = factors(torch.from_numpy(case.weight), case.solve(), 3)
    torch.testing.assert_close(a.norm(dim=0), b.norm(dim=1))


@pytest.mark.parametrize("shape", [(4, 6), (6, 4)], ids=str)
def test_weights_without_content(shape: tuple[int, int]) -> None:
    case = problem(shape, ("full", "full"), 5)
    case.weight[:] = 0
    projector = case.solve()
    assert projector.tail().tolist() == [0.0] * 5
    for factor in factors(torch.from_numpy(case.weight), projector, 4):
        assert torch.count_nonzero(factor) == 0
    case.weight[1] = 1
    np.testing.assert_allclose(case.approximation(case.solve(), 2), case.weight, rtol=0, atol=1e-12)


def test_low_precision_weights_are_factored_in_float64() -> None:
    weight = torch.randn(4, 6).bfloat16()
    a, b = factors(weight, decompose(Identity().form(weight), Identity()), 4)
    assert a.dtype == b.dtype == torch.float64
    torch.testing.assert_close(a @ b, weight.double())


def test_same_input_same_bytes() -> None:
    case = problem((6, 9), ("full", "full"), 6)
    first, second = case.solve(), case.solve()
    assert torch.equal(first.expand, second.expand)
    assert torch.equal(first.contract, second.contract)


def test_smaller_side() -> None:
    assert [smaller_side(shape) for shape in ((2, 3), (3, 3), (3, 2))] == ["out", "out", "in"]


def test_impossible_ranks() -> None:
    weight = torch.randn(4, 6)
    projector = decompose(Identity().form(weight), Identity(), keep=2)
    for rank in (3, -1):
        with pytest.raises(InputError, match=rf"between 0 and 2, got {rank}. Score again"):
            factors(weight, projector, rank)
    with pytest.raises(InputError, match=r"shape \(5, 6\) needs a projector of its smaller side, 5, got one of size 4"):
        factors(torch.randn(5, 6), projector, 1)
