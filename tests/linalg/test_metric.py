from __future__ import annotations

import numpy as np
import pytest
import torch

from lowrank_compress.errors import InputError, NumericsError
from lowrank_compress.linalg import metric as metrics
from lowrank_compress.linalg.metric import JITTERS, OWN_JITTERS, Diagonal, Full, Identity, Metric
from tests import reference

SIZE = 6


def moment(rank: int = SIZE, seed: int = 0) -> torch.Tensor:
    sample = torch.randn(rank, SIZE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return sample.mT @ sample / rank


def cases() -> list[tuple[str, Metric, torch.Tensor]]:
    weights = torch.linspace(0.5, 2, SIZE, dtype=torch.float64)
    diagonal = torch.diag(weights)
    return [
        ("identity", Identity(), torch.eye(SIZE, dtype=torch.float64)),
        ("diagonal", Diagonal(weights), diagonal),
        ("diagonal, shrunk", Diagonal(weights, 0.1), torch.from_numpy(reference.damp(diagonal.numpy(), 0.1))),
        ("full", Full(moment()), moment()),
        ("full, shrunk", Full(moment(), 0.1), torch.from_numpy(reference.damp(moment().numpy(), 0.1))),
        ("rank-deficient, shrunk", Full(moment(2), 0.1), torch.from_numpy(reference.damp(moment(2).numpy(), 0.1))),
    ]


@pytest.mark.parametrize(("metric", "dense"), [case[1:] for case in cases()], ids=[case[0] for case in cases()])
def test_root_is_a_root_of_the_damped_metric(metric: Metric, dense: torch.Tensor) -> None:
    root = metric.root()
    eye = torch.eye(SIZE, dtype=torch.float64)
    c = root.contract(eye).mT
    torch.testing.assert_close(c @ c.mT, dense, rtol=1e-12, atol=1e-12)
    form = moment(seed=1)
    torch.testing.assert_close(root.congruence(form), c.mT @ form @ c, rtol=1e-12, atol=1e-12)
    vectors = torch.randn(SIZE, 3, dtype=torch.float64)
    torch.testing.assert_close(root.expand(vectors), torch.linalg.inv(c).mT @ vectors, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(root.contract(vectors), vectors.mT @ c.mT, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("metric", "dense"),
    [
        (Identity(), torch.eye(SIZE, dtype=torch.float64)),
        (Diagonal(torch.arange(SIZE), 0.5), torch.diag(torch.arange(SIZE, dtype=torch.float64))),
        (Full(moment(2), 0.5), moment(2)),
    ],
    ids=["identity", "diagonal", "full"],
)
def test_form_is_not_damped(metric: Metric, dense: torch.Tensor) -> None:
    weight = torch.randn(4, SIZE)
    expected = weight.double() @ dense @ weight.double().mT
    form = metric.form(weight)
    assert form.dtype == torch.float64
    torch.testing.assert_close(form, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("panel", [1, 3, 5, 7])
def test_forms_in_panels(panel: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "PANEL", panel)
    weight = torch.randn(5, SIZE, dtype=torch.float64)
    squares = torch.rand(SIZE, dtype=torch.float64)
    torch.testing.assert_close(Identity().form(weight), weight @ weight.T, rtol=1e-12, atol=1e-12)
    expected = weight @ squares.diag() @ weight.T
    torch.testing.assert_close(Diagonal(squares).form(weight), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("decay", [0, 6])
def test_the_form_of_16_bit_weights(dtype: torch.dtype, decay: int) -> None:
    """Sums of a few hundred exact products in float32: nearer to the truth than float32 throughout."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(40, 3000, generator=generator) * torch.logspace(0, -decay / 2, 3000)
    weight = weight.to(dtype)
    exact = weight.double() @ weight.double().mT
    scale = exact.diagonal().sqrt()
    found = (Identity().form(weight) - exact).abs() / scale / scale[:, None]
    plain = (weight.float() @ weight.float().mT - exact).abs() / scale / scale[:, None]
    assert found.max() < 512**0.5 * 2**-24
    assert found.square().mean() < plain.square().mean()
    assert bool((Identity().form(weight[:, :1]) == weight[:, :1].double() @ weight[:, :1].double().mT).all())


@pytest.mark.parametrize("panel", [1, 4, 6])
def test_a_congruence_in_panels(panel: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "PANEL", panel)
    root, form = Full(moment(), 0.1).root(), moment(seed=1)
    found = root.congruence(form)
    torch.testing.assert_close(found, root.lower.mT @ form @ root.lower, rtol=1e-12, atol=1e-12)
    assert torch.equal(found, found.mT)


@pytest.mark.parametrize("rank", [2, SIZE])
def test_the_inverse_is_that_of_the_damped_moment(rank: int) -> None:
    given = moment(rank)
    before = given.clone()
    expected = np.linalg.inv(reference.damp(given.numpy(), 0.1))
    np.testing.assert_allclose(Full(given, 0.1).inverse().triu().numpy(), np.triu(expected), rtol=1e-10, atol=1e-12)
    assert torch.equal(given, before)


def test_only_the_symmetric_part_of_a_moment_counts() -> None:
    skew = torch.randn(SIZE, SIZE, dtype=torch.float64)
    expected = Full(moment(), 0.1).root().lower
    torch.testing.assert_close(Full(moment() + skew - skew.mT, 0.1).root().lower, expected)


def test_inputs_are_left_alone() -> None:
    given, weights = moment(2), torch.ones(SIZE, dtype=torch.float64)
    before = given.clone()
    Full(given, 0.1).root()
    Diagonal(weights, 0.1).root()
    assert torch.equal(given, before)
    assert torch.equal(weights, torch.ones(SIZE, dtype=torch.float64))


@pytest.mark.parametrize("metric", [Full(torch.zeros(3, 3), 0.1), Diagonal(torch.zeros(3), 0.1)])
def test_a_metric_of_nothing_is_damped_to_a_multiple_of_the_identity(metric: Metric) -> None:
    eye = torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close(metric.root().congruence(eye), 0.1 * eye)


def test_without_shrinkage_jitter_makes_a_rank_deficient_metric_invertible() -> None:
    for metric, dense in (
        (Full(moment(2)), moment(2)),
        (Diagonal(torch.tensor([0.0, 1, 2])), torch.diag(torch.tensor([0.0, 1, 2]))),
    ):
        c = metric.root().contract(torch.eye(len(dense), dtype=torch.float64)).mT
        torch.testing.assert_close(c @ c.mT, dense.double(), rtol=1e-6, atol=1e-6)
        assert np.linalg.eigvalsh((c @ c.mT).numpy()).min() > 0


def test_what_massive_activations_round_by_is_damped_in_proportion() -> None:
    """Fewer tokens than dimensions, two of which are large on the same ones: rounding is relative to each entry."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(50, 200, generator=generator, dtype=torch.float64)
    inputs[:, :2] = 300 * inputs[:, :1]
    exact = inputs.mT @ inputs / len(inputs)
    own = exact.diagonal().sqrt()
    noise = torch.randn(200, 200, generator=generator, dtype=torch.float64).triu()
    rounded = exact + 1e-5 * (noise + noise.triu(1).mT) * own * own[:, None]
    mean = rounded.diagonal().mean()
    assert torch.linalg.eigvalsh(rounded)[0] < -JITTERS[-1] * mean  # more than all have in common
    c = Full(rounded, 1e-6).root().contract(torch.eye(200, dtype=torch.float64)).mT
    added = c @ c.mT - (1 - 1e-6) * rounded - 1e-6 * mean * torch.eye(200)
    assert (added / own / own[:, None]).abs().max() <= 1.001 * OWN_JITTERS[-1]
    torch.testing.assert_close(added, added.diagonal().diag(), rtol=0, atol=1e-9 * mean.item())


def test_an_indefinite_moment_names_the_last_jitter() -> None:
    with pytest.raises(NumericsError, match=r"3x3 second moment is not positive definite.*even with 0\.0001 of"):
        Full(torch.diag(torch.tensor([1.0, 1.0, -1.0])), 0.01).root()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite(bad: float) -> None:
    with pytest.raises(NumericsError, match="full metric must be finite, but 1 of its 9 entries"):
        Full(torch.diag(torch.tensor([1.0, bad, 1.0])))
    with pytest.raises(NumericsError, match="diagonal metric must be finite, but 1 of its 3 entries"):
        Diagonal(torch.tensor([1.0, bad, 1.0]))


def test_impossible_metrics() -> None:
    with pytest.raises(NumericsError, match=r"cannot be negative; the least one is -2"):
        Diagonal(torch.tensor([1.0, -2.0]))
    with pytest.raises(InputError, match=r"shape \(k,\), got \(2, 2\)"):
        Diagonal(torch.ones(2, 2))
    with pytest.raises(InputError, match=r"shape \(k, k\), got \(2, 3\)"):
        Full(torch.ones(2, 3))
    with pytest.raises(InputError, match=r"shrinkage of a full metric must lie in \[0, 1\], got 1.5"):
        Full(torch.eye(2), 1.5)
    with pytest.raises(InputError, match=r"shrinkage of a diagonal metric must lie in \[0, 1\], got -1"):
        Diagonal(torch.ones(2), -1)
