"""The low-rank product beside a quantized matrix, against the SVD of an explicit metric and against descent."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowrank_compress.linalg.quantease import loss
from lowrank_compress.linalg.quantize import Grid
from lowrank_compress.linalg.residual import residual
from lowrank_compress.methods.rounding import ROUNDINGS, Problem, with_residual
from tests.linalg.test_quantize import drawn, gram_of


def least(error: Tensor, gram: Tensor, fisher: Tensor, rank: int) -> float:
    """By symmetric roots, and no triangle."""

    def root(metric: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(metric)
        return vectors * values.sqrt() @ vectors.mT

    return float(torch.linalg.svdvals(root(fisher) @ error @ root(gram))[rank:].square().sum())


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_it_is_the_best_of_its_rank_in_the_metric(rank: int) -> None:
    error, gram, fisher = drawn(6, 10), gram_of(10), gram_of(6, seed=5)
    outer, inner = residual(error, gram, fisher, rank)
    assert outer.shape == (6, rank)
    assert inner.shape == (rank, 10)
    assert loss(error - outer @ inner, gram, fisher) == pytest.approx(least(error, gram, fisher, rank), abs=1e-9)
    alone = residual(error, gram, None, rank)
    none = torch.eye(6).double()
    assert loss(error - alone[0] @ alone[1], gram) == pytest.approx(least(error, gram, none, rank), abs=1e-9)


@pytest.mark.parametrize("name", ["rtn", "quantease", "kfac"])
def test_both_together_lose_less_than_either_and_alternating_pays(name: str) -> None:
    weight, gram, fisher = drawn(16, 32), gram_of(32, mixed=0.2), gram_of(16, seed=5, mixed=0.2)
    known = {"rtn": (None, None), "quantease": (gram, None), "kfac": (gram, fisher)}[name]
    problem, grid = Problem(weight, torch.bfloat16, 0.01, 0.1, *known), Grid(2, 16)
    rounding = ROUNDINGS[name]
    alone = rounding.fit(problem, grid)
    both = with_residual(problem, grid, rounding, 4, torch.bfloat16)
    assert both.lost == pytest.approx(problem.lost(both.quantized, both.outer @ both.inner))
    assert torch.equal(both.outer, both.outer.bfloat16().double())
    outer, inner = residual(
        weight - alone.matrix(),
        torch.eye(32).double() if known[0] is None else problem.inputs(),
        None if known[1] is None else fisher,
        4,
    )
    once = problem.lost(alone, outer @ inner)
    assert both.lost < once < problem.lost(alone)
