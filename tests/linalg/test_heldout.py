"""Losses on another sample, at every rank at once, against the residual maps themselves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowrank_compress.linalg.heldout import corner_sums, falling, mixed, projector_losses, regression_losses
from lowrank_compress.linalg.metric import Full
from lowrank_compress.linalg.weighted import decompose, factors


def moment(size: int, tokens: int, seed: int) -> Tensor:
    rows = torch.randn(tokens, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return rows.T @ rows / tokens


def weighted(error: Tensor, output: Tensor, inputs: Tensor) -> float:
    """‖L E R‖² with LᵀL = output and R Rᵀ = inputs."""
    return float(torch.trace(output @ error @ inputs @ error.T))


def test_corner_sums_are_sums_of_lower_right_corners():
    product = torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = [product[rank:, rank:].sum() for rank in range(7)]
    assert torch.allclose(corner_sums(product), torch.stack(expected))


@pytest.mark.parametrize("shape", [(7, 12), (12, 7)])
@pytest.mark.parametrize("tokens", [5, 40])
def test_a_projector_on_another_sample(shape: tuple[int, int], tokens: int):
    rows, columns = shape
    weight = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    outputs, inputs = [moment(rows, tokens, seed) for seed in (2, 3)], [moment(columns, tokens, s) for s in (4, 5)]
    wide = rows <= columns
    near, far = (outputs, inputs) if wide else (inputs, outputs)
    side = weight if wide else weight.T
    projector = decompose(side @ far[0] @ side.T, Full(near[0], 1e-3))
    losses = projector_losses(projector, near[1], side @ far[1] @ side.T)
    for rank, loss in enumerate(losses):
        left, right = factors(weight, projector, rank)
        assert float(loss) == pytest.approx(weighted(weight - left @ right, outputs[1], inputs[1]), rel=1e-7, abs=1e-9)


@pytest.mark.parametrize("tokens", [6, 60])
def test_a_regression_on_another_sample(tokens: int):
    units, outputs = 9, 4
    weight = torch.randn(outputs, units, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    fisher, (gram, other) = moment(outputs, 20, 2), (moment(units, tokens, seed) for seed in (3, 4))
    damped = Full(gram, 1e-2)
    root = damped.root().lower
    images = weight.T @ torch.linalg.cholesky(fisher)
    losses = regression_losses(images, root, other)
    square = root @ root.T
    for kept, loss in enumerate(losses):
        predicted = torch.zeros_like(weight)
        solved = torch.linalg.solve(square[:kept, :kept], square[:kept, kept:])
        predicted[:, :kept] = weight[:, :kept] + weight[:, kept:] @ solved.T
        assert float(loss) == pytest.approx(weighted(weight - predicted, fisher, other), rel=1e-7, abs=1e-9)


def test_a_fit_that_interpolates_its_sample_is_told_by_another():
    units = 30
    weight = torch.randn(5, units, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gram, other = moment(units, 8, 3), moment(units, 8, 4)
    root = Full(gram, 1e-6).root().lower
    images = weight.T.contiguous()
    own, held_out = (regression_losses(images, root, sample)[10] for sample in (gram, other))
    assert own < 1e-3 * weighted(weight, torch.eye(5, dtype=torch.float64), gram)
    assert held_out > 0.3 * weighted(weight, torch.eye(5, dtype=torch.float64), other)


def test_mixing_adds_isotropic_moments_of_the_same_size():
    sample = moment(6, 3, 0)
    found = mixed(sample)
    assert float(found.trace()) == pytest.approx(float(sample.trace()))
    assert torch.linalg.matrix_rank(found) == 6


def test_falling_never_rises():
    found = falling(torch.tensor([3.0, 1.0, 2.0, -1.0, 0.0]))
    assert found.tolist() == [3, 1, 1, 0, 0]
