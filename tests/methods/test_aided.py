"""Rounding with help, against explicit outputs, the rounding of a smaller matrix, and all that could be tried."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowrank_compress.linalg.quantize import Grid, rounded, spanned
from lowrank_compress.methods.aided import STRENGTHS, Aid, Aided, aided
from lowrank_compress.methods.rounding import ROUNDINGS, Problem
from lowrank_compress.shipped.beside import Beside, rounded_activations
from tests.linalg.test_quantize import gram_of

M, N = 12, 32
LOUD = [5, 20]


def inputs(tokens: int = 64) -> Tensor:
    """Inputs of which two are forty times as large as others."""
    x = torch.randn(tokens, N, generator=torch.Generator().manual_seed(1)).double()
    x[:, LOUD] *= 40
    return x


def problem_of(x: Tensor, fisher: bool = False, dtype: torch.dtype = torch.float64) -> Problem:
    weight = torch.randn(M, N, generator=torch.Generator().manual_seed(2)).double()
    return Problem(weight, dtype, 0.01, 0.1, x.mT @ x / len(x), gram_of(M, seed=5, mixed=0.2) if fisher else None)


def aid_of(x: Tensor, rank: int = 0, threshold: float | None = None, smooth: bool = False, bits: int = 0) -> Aid:
    return Aid(rank, threshold, smooth, bits, x.abs().amax(0), x)


def whole(found: Aided) -> Tensor:
    matrix = found.quantized.matrix() / found.scales + found.outer @ found.inner
    matrix[:, found.columns] = found.kept
    return matrix


@pytest.mark.parametrize("name", ["rtn", "kfac"])
@pytest.mark.parametrize("bits", [0, 4])
def test_what_is_lost_is_what_outputs_differ_by(name: str, bits: int) -> None:
    x = inputs()
    problem = problem_of(x, name == "kfac")
    found = aided(problem, Grid(3, 8), ROUNDINGS[name], aid_of(x, 3, 60.0, True, bits))
    assert 0 < len(found.columns) <= 2
    off = x @ (problem.weight - whole(found)).mT
    metric = torch.eye(M).double() if problem.fisher is None else problem.fisher / 2
    unit = 1.0 if problem.fisher is not None else float((x @ problem.weight.mT).square().sum(1).mean())
    expected = sum(float(row @ metric @ row) for row in off) / len(x)
    if bits:
        met = x / found.scales
        met[:, found.columns] = 0
        for row in met:
            error = (row - rounded_activations(row, bits, 8)) @ found.quantized.matrix().mT
            expected += float(error @ metric @ error) / len(x)
    assert found.lost == pytest.approx(expected / unit)


@pytest.mark.parametrize("name", list(ROUNDINGS.own))
def test_of_full_rank_nothing_is_lost(name: str) -> None:
    x = inputs()
    problem = problem_of(x, True)
    found = aided(problem, Grid(2, 8), ROUNDINGS[name], aid_of(x, M, smooth=True))
    assert torch.allclose(whole(found), problem.weight, atol=1e-6)
    assert aided(problem, Grid(2, 8), ROUNDINGS[name], aid_of(x, 2, smooth=True)).lost > 1e3 * found.lost


@pytest.mark.parametrize("name", list(ROUNDINGS.own))
def test_columns_that_are_left_alone_are_exact_and_others_are_rounded_as_if_they_were_not_there(name: str) -> None:
    x = inputs()
    problem = problem_of(x, True)
    found = aided(problem, Grid(4, N), ROUNDINGS[name], aid_of(x, threshold=20.0))
    assert found.columns.tolist() == LOUD
    assert torch.equal(found.kept, problem.weight[:, LOUD])
    rest = [column for column in range(N) if column not in LOUD]
    assert problem.gram is not None
    small = Problem(
        problem.weight[:, rest], torch.float64, 0.01, 0.1, problem.gram[rest][:, rest], problem.fisher
    )  # fmt: skip
    expected = ROUNDINGS[name].fit(small, Grid(4, len(rest)))
    assert torch.equal(found.quantized.codes[:, rest], expected.codes)
    assert torch.equal(found.quantized.matrix()[:, rest], expected.matrix())
    assert not found.quantized.matrix()[:, LOUD].any()
    assert found.lost < ROUNDINGS[name].fit(problem, Grid(4, N)).codes.numel()
    assert found.lost < 0.2 * problem.lost(ROUNDINGS["rtn"].fit(problem, Grid(4, N)))


def test_no_column_is_left_alone_under_the_threshold_and_all_may_be() -> None:
    x = inputs()
    problem = problem_of(x)
    assert not len(aided(problem, Grid(4, 8), ROUNDINGS["rtn"], aid_of(x, threshold=1e3)).columns)
    found = aided(problem, Grid(4, 8), ROUNDINGS["gptq"], aid_of(x, 2, 1e-9, True, 8))
    assert len(found.columns) == N
    assert found.lost == 0
    assert torch.equal(whole(found), problem.weight)


@pytest.mark.parametrize("bits", [0, 4])
def test_the_shift_is_the_best_of_all(bits: int) -> None:
    x, grid = inputs(), Grid(4, 16)
    problem = problem_of(x)
    peaks, largest = x.abs().amax(0), problem.weight.abs().amax(0)
    tried = [torch.ones(N).double()]
    for strength in STRENGTHS:
        scales = peaks**strength / largest ** (1 - strength)
        tried.append(scales / scales.log().mean().exp())
    lost = []
    for scales in tried:
        codes = rounded(problem.weight * scales, spanned(problem.weight * scales, grid)).matrix()
        off = x @ (problem.weight - codes / scales).mT
        error = x / scales
        error = (error - rounded_activations(error, bits, 16)) @ codes.mT if bits else off * 0
        lost.append(float((off.square() + error.square()).sum(1).mean()))
    best = min(range(len(tried)), key=lambda number: lost[number])
    found = aided(problem, grid, ROUNDINGS["rtn"], aid_of(x, smooth=True, bits=bits))
    assert best > 0
    assert torch.allclose(found.scales, tried[best])


def test_shift_and_product_each_pay_where_activations_have_outliers() -> None:
    x, grid = inputs(), Grid(4, N)
    problem = problem_of(x, dtype=torch.bfloat16)
    asked = [(0, False), (0, True), (4, True)]
    lost = [
        aided(problem, grid, ROUNDINGS["rtn"], aid_of(x, rank, smooth=smooth, bits=4)).lost for rank, smooth in asked
    ]
    assert lost[2] < 0.7 * lost[1] < 0.3 * lost[0]


def test_stored_numbers_are_those_that_were_reckoned_with() -> None:
    x = inputs()
    found = aided(problem_of(x, dtype=torch.bfloat16), Grid(4, 8), ROUNDINGS["rtn"], aid_of(x, 2, 60.0, True))
    beside = Beside(2, len(found.columns), True)
    tensors = found.tensors(beside)
    assert {name: tuple(each.shape) for name, each in tensors.items()} == {
        name: shape for name, (shape, _) in beside.buffers(M, N, None).items()
    }
    assert all(torch.equal(each.bfloat16().double(), each.double()) for each in tensors.values())
    assert torch.equal(spanned(problem_of(x).weight, Grid(4, 8)).scale.abs() * 8, peaks_of_groups(problem_of(x).weight))


def peaks_of_groups(weight: Tensor) -> Tensor:
    return torch.tensor([[float(weight[row, 8 * k : 8 * k + 8].abs().max()) for k in range(4)] for row in range(M)])
