"""Regression in closed form against gradient descent and plain least squares, and its cross-validation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowrank_compress.linalg import crossvalidated
from lowrank_compress.linalg.crossvalidated import LAMBDAS, Present, cross_validate, refit
from lowrank_compress.linalg.refine import Sample, Task, error, project, solve, solved, truncate
from lowrank_compress.linalg.weighted import Side


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sample(x: Tensor, t: Tensor) -> Sample:
    """Sums over rows, one a token."""
    return Sample(x.mT @ x, t.mT @ x, x.sum(0), t.sum(0), len(x))


def spd(size: int, seed: int = 0) -> Tensor:
    half = drawn(size, 2 * size, seed=seed)
    return half @ half.mT / size


def halves(x: Tensor, t: Tensor) -> tuple[Sample, Sample]:
    return sample(x[::2], t[::2]), sample(x[1::2], t[1::2])


@pytest.mark.parametrize("strength", LAMBDAS)
def test_it_is_where_gradient_descent_ends(strength: float):
    x, t, anchor = drawn(60, 5), drawn(60, 3, seed=1), drawn(3, 5, seed=2)
    pull = strength * x.square().sum(0).mean()
    matrix = anchor.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([matrix], max_iter=500, tolerance_grad=1e-13, tolerance_change=0)

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = (x @ matrix.mT - t).square().sum() + pull * (matrix - anchor).square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    torch.testing.assert_close(solve(sample(x, t), anchor, strength), matrix.detach(), rtol=1e-6, atol=1e-8)


def test_maps_that_copy_have_one_solution_in_common():
    x, seen, weight = drawn(50, 6), drawn(50, 6, seed=1), drawn(4, 6, seed=2)
    common = solve(sample(seen, x), None, 0.1)
    alone = solve(sample(seen, x @ weight.mT), weight, 0.1)
    torch.testing.assert_close(weight @ common, alone)


@pytest.mark.parametrize("shape", [(4, 7), (7, 4), (5, 5)], ids=str)
@pytest.mark.parametrize("rank", [1, 3])
def test_a_truncation_is_the_best_one_in_both_metrics(shape: tuple[int, int], rank: int):
    m, n = shape
    found, metric, x = drawn(m, n), spd(m), drawn(40, n, seed=3)
    task = Task(metric, rank, "out" if m <= n else "in")
    taken = truncate(task, found, sample(x, x @ found.mT))
    left = torch.linalg.cholesky(metric).mT
    right = torch.linalg.cholesky(x.mT @ x)
    u, s, v = torch.linalg.svd(left @ found @ right, full_matrices=False)
    best = torch.linalg.solve(left, u[:, :rank] * s[:rank] @ v[:rank]) @ torch.linalg.inv(right)
    torch.testing.assert_close(taken, best, rtol=1e-4, atol=1e-4)


def test_a_metric_that_is_folded_into_the_input_side_gives_the_same():
    x, seen, weight, metric = drawn(80, 4), drawn(80, 4, seed=1), drawn(9, 4, seed=2), spd(9)
    both = halves(seen, x)
    plain = Task(metric, 2, "in", base=weight)
    folded = Task(weight.mT @ metric @ weight, 2, "in", left=weight)
    now = drawn(4, 4, seed=4)
    chosen = [
        cross_validate([task], [Present(matrix)], both) for task, matrix in ((plain, weight @ now), (folded, now))
    ]
    assert chosen[0] == chosen[1]
    for one, other in zip(refit([plain], [0.1], both[0]), refit([folded], [0.1], both[0]), strict=True):
        assert one is not None
        assert other is not None
        torch.testing.assert_close(one[0], other[0])
        assert one[1] is not None
        assert other[1] is not None
        torch.testing.assert_close(
            one[0] @ one[1].contract.mT @ one[1].expand.mT, other[0] @ other[1].contract.mT @ other[1].expand.mT
        )


@pytest.mark.parametrize("biased", [False, True])
def test_the_score_is_the_squared_error_but_for_a_constant(biased: bool):
    x, t, metric = drawn(30, 4), drawn(30, 3, seed=1), spd(3)
    bias = drawn(3, seed=5) if biased else None
    task = Task(metric, None, "out", affine=biased)

    def slow(matrix: Tensor) -> float:
        off = x @ matrix.mT + (0 if bias is None else bias) - t
        return torch.einsum("ti,ij,tj->", off, metric, off).item()

    one, other = drawn(3, 4, seed=6), drawn(3, 4, seed=7)
    found = error(task, one, bias, sample(x, t)) - error(task, other, bias, sample(x, t))
    assert found == pytest.approx(slow(one) - slow(other))


def test_sums_of_halves_are_the_sum_of_all():
    x, t = drawn(31, 4), drawn(31, 3, seed=1)
    first, second = halves(x, t)
    whole, added = sample(x, t), first + second
    for name in ("gram", "cross", "inputs", "targets"):
        torch.testing.assert_close(getattr(added, name), getattr(whole, name))
    assert added.count == whole.count
    centred = whole.centred()
    torch.testing.assert_close(centred.gram, sample(x - x.mean(0), t).gram)
    torch.testing.assert_close(centred.cross, sample(x - x.mean(0), t - t.mean(0)).cross)


def test_a_bias_takes_the_mean_error():
    x, weight = drawn(60, 4) + 3, drawn(3, 4, seed=1)
    t = x @ weight.mT + torch.tensor([1.0, -2.0, 5.0], dtype=torch.float64)
    both = halves(x, t)
    task = Task(spd(3), None, "out", affine=True)
    now = Present(weight + 0.3 * drawn(3, 4, seed=2), torch.zeros(3, dtype=torch.float64))
    (chosen,) = cross_validate([task], [now], both, weight)
    assert chosen is not None
    ((matrix, projector),) = [each for each in refit([task], [chosen], both[0] + both[1], weight) if each is not None]
    assert projector is None
    torch.testing.assert_close(matrix, weight, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close((both[0] + both[1]).offset(matrix), t[0] - weight @ x[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tokens", [0, 1, 2, 6, 30])
@pytest.mark.parametrize("what", ["noise", "rank-deficient", "dead"])
@pytest.mark.parametrize("seed", range(3))
def test_what_is_right_already_stays(tokens: int, what: str, seed: int):
    """What is there does all that is asked, on tokens that may be few or alike: no fit to another anchor wins."""
    weight = drawn(4, 8, seed=seed)
    x = drawn(tokens, 8, seed=seed + 10)
    if what == "rank-deficient":
        x = x[:, :2] @ drawn(2, 8, seed=seed + 20)
    if what == "dead":
        x = x * 0
    t = x @ weight.mT
    task = Task(spd(4, seed), None, "out")
    assert cross_validate([task], [Present(weight)], halves(x, t), drawn(4, 8, seed=seed + 30)) == [None]


@pytest.mark.parametrize("tokens", [4, 10, 40, 400])
@pytest.mark.parametrize("rank", [None, 2])
def test_on_random_targets_nothing_is_ever_worse_in_the_score(tokens: int, rank: int | None):
    """Whatever is chosen has the least score of all that may be, what is there included."""
    x, t, now = drawn(tokens, 6), drawn(tokens, 4, seed=1), Present(0.01 * drawn(4, 6, seed=2))
    both, anchor = halves(x, t), drawn(4, 6, seed=3)
    task = Task(spd(4), rank, "out")

    def score(strength: float | None) -> float:
        if strength is None:
            return sum(error(task, now.matrix, None, half) for half in both)
        return sum(
            error(task, truncate(task, solve(fit, anchor, strength), fit), None, other)
            for fit, other in (both, both[::-1])
        )

    (chosen,) = cross_validate([task], [now], both, anchor)
    assert score(chosen) == min(score(strength) for strength in (None, *LAMBDAS))


@pytest.mark.parametrize("anchored", [False, True])
@pytest.mark.parametrize("single", [False, True])
def test_what_a_regression_knows_of_its_solution_spares_the_product(anchored: bool, single: bool):
    x, t = drawn(40, 6), drawn(40, 6, seed=1)
    seen = sample(x, t).single() if single else sample(x, t)
    found = solved(seen, drawn(6, 6, seed=2) if anchored else None, 0.3)
    exact = {"rtol": 1e-4, "atol": 1e-4} if single else {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(found.form(), found.matrix @ seen.gram @ found.matrix.mT, **exact)
    task = Task(spd(6), 3, "out")
    torch.testing.assert_close(truncate(task, found.matrix, seen, found), truncate(task, found.matrix, seen), **exact)


def test_large_maps_are_fitted_on_one_half(monkeypatch: pytest.MonkeyPatch):
    """The λ of least error on the second half, as the whole search would find it there."""
    monkeypatch.setattr(crossvalidated, "LARGE", 1)
    x, t, now = drawn(40, 6), drawn(40, 4, seed=1), Present(0.01 * drawn(4, 6, seed=2))
    (first, second), task = halves(x, t), Task(spd(4), 2, "out")
    scores: dict[float | None, float] = {None: error(task, now.matrix, None, second)}
    for strength in LAMBDAS:
        scores[strength] = error(task, truncate(task, solve(first, None, strength), first), None, second)
    (chosen,) = cross_validate([task], [now], (first, second), None)
    assert chosen == min(scores, key=scores.__getitem__)


def test_a_map_of_any_rank_has_no_projection():
    x = drawn(10, 4)
    assert project(Task(spd(3), None, "out"), drawn(3, 4), sample(x, drawn(10, 3, seed=1))) is None


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("side", ["out", "in"])
def test_candidates_in_single_precision_lead_to_the_same_choice(
    affine: bool, side: Side, monkeypatch: pytest.MonkeyPatch
):
    x, seen, weight = drawn(90, 8), drawn(90, 8, seed=1), drawn(5, 8, seed=2)
    both = halves(x + 0.3 * seen, x)
    task = Task(spd(5), 3, side, base=weight, affine=affine)
    zero = torch.zeros(5, dtype=torch.float64)
    now = Present(weight + 0.5 * drawn(5, 8, seed=3), zero if affine else None)
    chosen = cross_validate([task], [now], both)
    precise = crossvalidated._scored([task], *both, None, 0.1)
    monkeypatch.setattr(crossvalidated, "LARGE", 0)
    assert cross_validate([task], [now], both) == chosen != [None]
    assert crossvalidated._scored([task], *both, None, 0.1) == pytest.approx(precise, rel=1e-4)
