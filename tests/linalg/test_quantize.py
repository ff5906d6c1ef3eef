"""Codes, scales and sweeps against all roundings there are, explicit losses and slow loops."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from lowrank_compress.errors import NumericsError
from lowrank_compress.linalg.quantease import descended, loss, with_outliers
from lowrank_compress.linalg.quantize import Grid, Quantized, Scales, refitted, rounded, searched
from lowrank_compress.linalg.sweep import damped, swept
from lowrank_compress.linalg.twosided import TILE, swept_both, unit_upper

GRIDS = [Grid(3, 4), Grid(4, 8, False), Grid(2, 4, False)]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gram_of(size: int, seed: int = 1, mixed: float = 0.7) -> Tensor:
    x = drawn(4 * size, size, seed=seed) @ (torch.eye(size).double() + mixed * drawn(size, size, seed=seed + 1))
    return x.mT @ x / len(x)


def all_codes(columns: int, grid: Grid) -> Tensor:
    return torch.tensor(list(itertools.product(range(grid.low, grid.high + 1), repeat=columns))).double()


def explicit(error: Tensor, gram: Tensor, fisher: Tensor | None = None) -> float:
    m = len(error)
    whole = torch.kron(torch.eye(m).double() if fisher is None else fisher, gram)
    return float(error.flatten() @ whole @ error.flatten())


@pytest.mark.parametrize("grid", GRIDS)
def test_nearest_points_are_the_best_of_all_where_nothing_is_coupled(grid: Grid) -> None:
    weight = drawn(3, 8)
    scales = searched(weight, grid)
    found = rounded(weight, scales)
    scale, zero = scales.columns()
    points = torch.arange(grid.low, grid.high + 1).double()
    best = ((points - zero[..., None]) * scale[..., None] - weight[..., None]).abs().amin(-1)
    assert torch.allclose((found.matrix() - weight).abs(), best, atol=1e-12)
    assert found.codes.min() >= grid.low
    assert found.codes.max() <= grid.high


@pytest.mark.parametrize("symmetric", [True, False])
def test_searched_scales_are_storable_and_lose_no_more_than_the_widest(symmetric: bool) -> None:
    weight, weigh = drawn(6, 16), drawn(16, seed=3).square() + 0.1
    grid = Grid(3, 8, symmetric)
    scales = searched(weight, grid, weigh, torch.bfloat16)
    assert torch.equal(scales.scale, scales.scale.bfloat16().double())
    low, high = weight.view(6, 2, 8).amin(2).clamp_max(0), weight.view(6, 2, 8).amax(2).clamp_min(0)
    if symmetric:
        widest = Scales(grid, weight.view(6, 2, 8).abs().amax(2) / 3.5, torch.zeros(6, 2).double())
    else:
        step = (high - low) / 7
        widest = Scales(grid, step, (-4 - low / step).round())

    def lost(found: Quantized) -> float:
        return float(((found.matrix() - weight).square() @ weigh).sum())

    assert lost(rounded(weight, scales)) < lost(rounded(weight, widest))


def test_a_group_of_zeros_stays_zero_and_eight_bits_are_nearly_exact() -> None:
    weight = drawn(4, 16)
    weight[:, 8:] = 0
    for symmetric in (True, False):
        found = rounded(weight, searched(weight, Grid(8, 8, symmetric), None, torch.bfloat16)).matrix()
        assert torch.equal(found[:, 8:], weight[:, 8:])
        assert (found - weight).abs().max() < weight.abs().max() / 127


def test_columns_must_come_in_whole_groups() -> None:
    with pytest.raises(ValueError, match="12 columns cannot be cut into groups of 8"):
        searched(drawn(2, 12), Grid(4, 8))


def test_sweeps_and_descent_against_all_roundings_of_a_row() -> None:
    grid, gram = Grid(2, 4), gram_of(4)
    near = swept_loss = descent = best = 0.0
    for seed in range(20):
        weight = drawn(1, 4, seed=seed)
        scales = searched(weight, grid)
        codes = all_codes(4, grid)
        losses = [explicit(weight - Quantized(scales, row[None]).matrix(), gram) for row in codes]
        best += min(losses)
        near += explicit(weight - rounded(weight, scales).matrix(), gram)
        one = swept(weight, scales, gram)
        swept_loss += explicit(weight - one.matrix(), gram)
        down = descended(one, weight, gram, 3)
        descent += explicit(weight - down.matrix(), gram)
        assert explicit(weight - down.matrix(), gram) >= min(losses) - 1e-12
    assert best <= descent <= swept_loss < near
    assert descent < best + 0.25 * (near - best)


def slow_sweep(weight: Tensor, scales: Scales, gram: Tensor, fisher: Tensor) -> Tensor:
    """Round weight after weight, all later ones moved to where they make up best for the error, by least squares."""
    m, n = weight.shape
    rows, columns = (torch.argsort(each.diagonal(), descending=True, stable=True) for each in (fisher, gram))
    whole = torch.kron(fisher[rows][:, rows], gram[columns][:, columns])
    scale, zero = (part[rows][:, columns].flatten() for part in scales.columns())
    wanted = weight[rows][:, columns].flatten()
    error, codes = torch.zeros(m * n).double(), torch.zeros(m * n).double()
    for place in range(m * n):
        # The free ones minimise the loss given the errors so far; where they leave this one is what is rounded.
        free = torch.linalg.solve(whole[place:, place:], whole[place:, :place] @ error[:place])
        aim = wanted[place] + free[0]
        code = ((aim / scale[place]).round() + zero[place]).clamp(scales.grid.low, scales.grid.high)
        codes[place], error[place] = code, wanted[place] - (code - zero[place]) * scale[place]
    found = torch.empty(m, n).double()
    found[rows[:, None], columns[None]] = codes.view(m, n)
    return found


@pytest.mark.parametrize("symmetric", [True, False])
def test_both_sweeps_against_least_squares_weight_by_weight(symmetric: bool) -> None:
    weight, gram, fisher = drawn(5, 8), gram_of(8), gram_of(5, seed=7)
    scales = searched(weight, Grid(3, 4, symmetric))
    assert torch.equal(swept_both(weight, scales, gram, fisher).codes, slow_sweep(weight, scales, gram, fisher))
    alone = torch.eye(5).double()
    assert torch.equal(swept(weight, scales, gram).codes, slow_sweep(weight, scales, gram, alone))


def test_many_tiles_with_no_metric_on_the_rows_are_the_sweep_over_columns() -> None:
    weight, gram = drawn(TILE + 7, 3 * TILE - 4), damped(gram_of(3 * TILE - 4), 0.01)
    scales = searched(weight, Grid(3, 4, False))
    both = swept_both(weight, scales, gram, torch.eye(len(weight)).double())
    assert (both.codes == swept(weight, scales, gram).codes).double().mean() > 0.999  # ties may round either way


def test_each_metric_is_best_in_its_own() -> None:
    weight, gram, fisher = drawn(40, 72), gram_of(72, mixed=0.1), gram_of(40, seed=9, mixed=0.1)
    scales = searched(weight, Grid(3, 8))
    near, columns = rounded(weight, scales), swept(weight, scales, gram)
    both = swept_both(weight, scales, gram, fisher)
    lost = [loss(weight - found.matrix(), gram, fisher) for found in (near, columns, both)]
    assert lost == pytest.approx([explicit(weight - q.matrix(), gram, fisher) for q in (near, columns, both)])
    assert lost[2] < 0.8 * lost[1] < 0.8 * lost[0]
    assert loss(weight - columns.matrix(), gram) < loss(weight - both.matrix(), gram)


def test_descent_never_rises_and_ends_where_no_single_code_is_better() -> None:
    weight, gram, grid = drawn(4, 136), gram_of(136), Grid(3, 8)  # more columns than are gone over at once
    found = rounded(weight, searched(weight, grid))
    losses = [explicit(weight - found.matrix(), gram)]
    for _ in range(12):
        found = descended(found, weight, gram)
        losses.append(explicit(weight - found.matrix(), gram))
    assert all(after <= before + 1e-9 for before, after in itertools.pairwise(losses))
    assert losses[-1] < 0.5 * losses[0]
    assert losses[-1] == losses[-2]
    for row, column, step in itertools.product(range(4), range(0, 136, 17), (-1, 1)):
        codes = found.codes.clone()
        codes[row, column] = (codes[row, column] + step).clamp(grid.low, grid.high)
        assert explicit(weight - Quantized(found.scales, codes).matrix(), gram) >= losses[-1] - 1e-9


def test_refitted_scales_are_those_of_least_squares() -> None:
    weight, gram = drawn(3, 12), gram_of(12)
    found = rounded(weight, searched(weight, Grid(3, 4, False)))
    again = refitted(found, weight, gram)
    root = torch.linalg.cholesky(gram)
    centred = found.codes - found.scales.columns()[1]
    for row in range(3):
        spread = torch.zeros(12, 3).double()
        for group in range(3):
            spread[4 * group : 4 * group + 4, group] = centred[row, 4 * group : 4 * group + 4]
        solved = torch.linalg.lstsq(root.mT @ spread, root.mT @ weight[row]).solution
        assert torch.allclose(again.scales.scale[row], solved, atol=1e-8)


def test_outliers_are_few_and_pay() -> None:
    weight, gram = drawn(8, 32), gram_of(32, mixed=0.05)
    weight[2, 5], weight[6, 20] = 9.0, -7.0
    found = descended(rounded(weight, searched(weight, Grid(3, 8))), weight, gram, 2)
    assert not with_outliers(found, weight, gram, 0)[1].any()
    quantized, sparse = with_outliers(found, weight, gram, 2)
    assert {tuple(place) for place in sparse.nonzero().tolist()} == {(2, 5), (6, 20)}
    assert explicit(weight - quantized.matrix() - sparse, gram) < 0.7 * explicit(weight - found.matrix(), gram)


def test_metrics_that_are_not_definite_are_refused() -> None:
    weight, flat = drawn(4, 8), torch.zeros(8, 8).double()
    scales = searched(weight, Grid(4, 8))
    with pytest.raises(NumericsError, match=r"not positive definite. Raise --damping"):
        swept(weight, scales, flat)
    with pytest.raises(NumericsError, match=r"metric of a quantized matrix is not positive definite"):
        unit_upper(flat)
    assert torch.equal(damped(flat, 0.01), torch.eye(8).double())
    assert damped(2 * torch.eye(2).double(), 0.5)[0, 0] == 3
