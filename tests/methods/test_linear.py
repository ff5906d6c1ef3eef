from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from lowrank_compress.allocation.table import ALLOCATORS
from lowrank_compress.arch.resolve import resolve
from lowrank_compress.arch.targets import Rows, Target, View
from lowrank_compress.calibration.statistics import STATISTICS, statistic_key
from lowrank_compress.linalg.weighted import factors
from lowrank_compress.methods.linear import (
    ABSOLUTE,
    CENTRED_GRAM,
    FISHER,
    GRAM,
    PLAIN,
    ROW_FISHER,
    Damping,
    LinearMethod,
    decompose_target,
    sensitivities,
)
from lowrank_compress.methods.table import METHODS as ALL
from tests.ordinary import matrix, statistics, tokens, traces
from tests.reference import damp, metric_loss, square_root
from tests.tiny import tiny_model

METHODS = {name: method for name, method in ALL.items() if isinstance(method, LinearMethod)}
# What each side is made of, in words; and the table of the design in these words.
SIDES = {
    PLAIN: "nothing",
    ROW_FISHER: "row_fisher",
    FISHER: "out_fisher",
    ABSOLUTE: "in_abs",
    CENTRED_GRAM: "centred",
    GRAM: "in_gram",
}
METRICS = {name: (SIDES[method.left], SIDES[method.right]) for name, method in METHODS.items()}
PAPERS = {
    "svd": ("nothing", "nothing"),
    "fwsvd": ("row_fisher", "nothing"),
    "asvd": ("nothing", "in_abs"),
    "afm": ("nothing", "centred"),
    "svd-llm": ("nothing", "in_gram"),
    "kfac": ("out_fisher", "in_gram"),
}
# Neither equal to each other nor at their defaults.
DAMPING = Damping(fisher=3e-3, gram=2e-4, options={"alpha": 0.7})


@dataclass(frozen=True)
class Sample:
    """One matrix of a tiny model and all its statistics."""

    target: Target
    weight: np.ndarray
    means: Mapping[str, Tensor]

    def mean(self, name: str) -> np.ndarray:
        return self.means[statistic_key(self.target, name)].numpy()

    def squares(self, method: str, damping: Damping | None) -> tuple[np.ndarray, np.ndarray]:
        """LᵀL and R Rᵀ as dense matrices; the one on the smaller side is damped, unless no side is."""
        rows, columns = self.target.shape
        left, right = METRICS[method]
        output = {
            "nothing": lambda: np.eye(rows),
            "row_fisher": lambda: np.diag(self.mean("row_fisher")),
            "out_fisher": lambda: self.mean("out_fisher"),
        }[left]()
        centre = self.mean("in_mean") * (self.target.bias is not None)
        inputs = {
            "nothing": lambda: np.eye(columns),
            "in_abs": lambda: np.diag(self.mean("in_abs") ** (2 * DAMPING.power)),
            "in_gram": lambda: self.mean("in_gram"),
            "centred": lambda: self.mean("in_gram") - np.outer(centre, centre),
        }[right]()
        # The smaller side always, the larger one where it is no diagonal matrix.
        if damping is not None and left != "nothing" and (rows <= columns or left == "out_fisher"):
            output = damp(output, damping.fisher)
        if damping is not None and right != "nothing" and (rows > columns or right in ("in_gram", "centred")):
            inputs = damp(inputs, damping.gram)
        return output, inputs

    def best(self, method: str, rank: int) -> tuple[np.ndarray, np.ndarray]:
        """Singular values of L W R, and Ŵ: L⁻¹ U_r U_rᵀ L W or, on the other side, W R V_r V_rᵀ R⁻¹."""
        output, inputs = self.squares(method, DAMPING)
        left, right = square_root(output), square_root(inputs)
        u, s, v = np.linalg.svd(left @ self.weight @ right, full_matrices=False)
        if self.target.shape[0] <= self.target.shape[1]:
            return s, np.linalg.solve(left, u[:, :rank] @ u[:, :rank].T @ left) @ self.weight
        return s, self.weight @ np.linalg.solve(right, v[:rank].T @ v[:rank] @ right).T

    def compressed(self, method: LinearMethod, rank: int, damping: Damping = DAMPING) -> np.ndarray:
        weight = torch.from_numpy(self.weight)
        left, right = factors(weight, decompose_target(method, self.target, weight, self.means, damping), rank)
        return (left @ right).numpy()


def samples_of(model_type: str, *lengths: int) -> dict[str, Sample]:
    """All matrices of the last block of a tiny model."""
    model = tiny_model(model_type, dtype=torch.float64)
    targets = [target for target in resolve(model).targets if target.block == 1]
    seen, terms = traces(model, [target.name for target in targets], tokens(*lengths), None)
    found = {}
    for target in targets:
        weight = matrix(model, target.name).detach()
        means = statistics(seen[target.name], weight, terms)
        assert means.keys() == {
            name for name, entry in STATISTICS.items() if entry.fits("up") and "size" not in entry.dimensions
        }
        keyed = {statistic_key(target, name): value for name, value in means.items()}
        found[f"{model_type}:{target.role}"] = Sample(target, weight.numpy(), keyed)
    return found


# 104 tokens, more than any dimension; and 9, fewer than all of them.
MANY = samples_of("llama", *[26] * 4) | samples_of("gpt2", *[26] * 4)
FEW = samples_of("llama", 9) | samples_of("gpt2", 9)
SAMPLES = {f"many-{name}": sample for name, sample in MANY.items()} | {f"few-{name}": s for name, s in FEW.items()}


def test_the_samples_are_of_every_kind() -> None:
    shapes = {sample.target.shape for sample in MANY.values()}
    assert {(32, 32), (16, 32), (72, 32), (32, 72)} <= shapes
    assert {sample.target.bias is not None for sample in MANY.values()} == {True, False}
    assert PAPERS.items() <= METRICS.items()
    for name, sample in SAMPLES.items():
        assert np.linalg.matrix_rank(sample.mean("in_gram")) == min(
            sample.target.shape[1], 104 if "many" in name else 9
        )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", SAMPLES)
def test_equals_the_svd_of_the_weighted_matrix(name: str, method: str) -> None:
    sample = SAMPLES[name]
    weight = torch.from_numpy(sample.weight)
    projector = decompose_target(METHODS[method], sample.target, weight, sample.means, DAMPING)
    size = min(sample.target.shape)
    output, inputs = sample.squares(method, DAMPING)
    for rank in (1, size // 3, size - 1, size):
        s, best = sample.best(method, rank)
        total = np.sum(s**2)
        assert np.abs(projector.values.numpy() - s**2).max() <= 1e-11 * total
        assert projector.total == pytest.approx(total, rel=1e-11)
        found = sample.compressed(METHODS[method], rank)
        assert metric_loss(sample.weight - found, output, inputs) == pytest.approx(
            np.sum(s[rank:] ** 2), abs=1e-11 * total
        )
        # Below a rank that the metric does not have, and between equal values, the best matrix is not the only one.
        if rank == size or 1e-5 * s[0] < s[rank - 1] > s[rank] / 0.99:
            assert metric_loss(best - found, output, inputs) <= 1e-14 * total
            assert np.abs(best - found).max() <= 1e-6 * np.abs(sample.weight).max()
    assert np.abs(sample.compressed(METHODS[method], size) - sample.weight).max() <= 1e-9


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", SAMPLES)
def test_the_first_components_alone(name: str, method: str) -> None:
    sample = SAMPLES[name]
    arguments = METHODS[method], sample.target, torch.from_numpy(sample.weight), sample.means, DAMPING
    whole, part = decompose_target(*arguments), decompose_target(*arguments, keep=5)
    assert part.values.shape == (5,)
    assert torch.equal(part.values, whole.values[:5])
    assert part.total == whole.total
    torch.testing.assert_close(part.tail(), whole.tail()[:6], rtol=1e-9, atol=1e-14 * whole.total)


@pytest.mark.parametrize("rank", [1, 5, 11])
@pytest.mark.parametrize("name", MANY)
def test_no_method_beats_another_in_its_own_metric(name: str, rank: int) -> None:
    sample = MANY[name]
    found = {method: sample.compressed(METHODS[method], rank) for method in METRICS}
    for own, other in itertools.permutations(METRICS, 2):
        squares = sample.squares(own, DAMPING)
        mine, theirs = (metric_loss(sample.weight - found[method], *squares) for method in (own, other))
        assert mine <= theirs * (1 + 1e-9)
        if METRICS[own] != METRICS[other] and {own, other} != {"afm", "svd-llm"}:
            assert mine < theirs * (1 - 1e-6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", SAMPLES)
def test_sensitivities_are_the_diagonals_of_the_metrics(name: str, method: str) -> None:
    sample = SAMPLES[name]
    found = sensitivities(METHODS[method], sample.target, sample.means, DAMPING)
    for diagonal, square in zip(found, sample.squares(method, damping=None), strict=True):
        assert diagonal.dtype == torch.float64
        np.testing.assert_allclose(diagonal.numpy(), np.diag(square), rtol=1e-11, atol=1e-14 * np.abs(square).max())


@pytest.mark.parametrize("method", METHODS)
def test_only_the_smaller_side_is_ever_square(method: str) -> None:
    """No statistic has more elements than the smaller side squared, and none is taken that is not needed."""
    targets = tuple(sample.target for sample in MANY.values())
    wanted = {target.name: METHODS[method].statistics(target) for target in targets}
    for sample in MANY.values():
        small = min(sample.target.shape)
        names = wanted[sample.target.name]
        used = {}
        for name in names:
            if len(STATISTICS[name].dimensions) == 2:
                assert sample.mean(name).shape == (small, small)
            used[statistic_key(sample.target, name)] = sample.means[statistic_key(sample.target, name)]
        # These suffice ...
        arguments = torch.from_numpy(sample.weight), used, DAMPING
        decompose_target(METHODS[method], sample.target, *arguments)
        sensitivities(METHODS[method], sample.target, used, DAMPING)
        # ... and each is needed.
        for key in used:
            with pytest.raises(KeyError):
                decompose_target(
                    METHODS[method],
                    sample.target,
                    arguments[0],
                    {name: value for name, value in used.items() if name != key},
                    DAMPING,
                )
    assert any(wanted.values()) == (METRICS[method] != ("nothing", "nothing"))


@pytest.mark.parametrize("name", MANY)
def test_kfac_predicts_the_second_order_term(name: str) -> None:
    """Where gradients and inputs are independent, ½ Σ σ² is ½ E[(gᵀ (W − Ŵ) x)²]: here every g meets every x."""
    sample = MANY[name]
    rows, columns = sample.target.shape
    rng = np.random.default_rng(0)
    g, x = rng.normal(size=(200, rows)), rng.normal(size=(190, columns)) + 0.5
    y, delta = x @ sample.weight.T, g @ sample.weight
    means = {
        "in_gram": x.T @ x / 190,
        "in_square": (x**2).mean(0),
        "out_gram": y.T @ y / 190,
        "out_fisher": g.T @ g / 200,
        "out_square": (g**2).mean(0),
        "in_fisher": delta.T @ delta / 200,
    }
    keyed = {statistic_key(sample.target, key): torch.from_numpy(value) for key, value in means.items()}
    exact = Sample(sample.target, sample.weight, keyed)
    undamped = Damping(fisher=0, gram=0)
    projector = decompose_target(METHODS["kfac"], sample.target, torch.from_numpy(sample.weight), keyed, undamped)
    for rank in (0, 3, min(rows, columns) - 1):
        error = sample.weight - exact.compressed(METHODS["kfac"], rank, undamped)
        second_order = np.mean([(g @ error @ one) ** 2 for one in x]) / 2
        assert float(projector.tail()[rank]) / 2 == pytest.approx(second_order, rel=1e-9)
        assert second_order == pytest.approx(metric_loss(error, means["out_fisher"], means["in_gram"]) / 2, rel=1e-9)


@pytest.mark.parametrize("rank", [1, 7])
@pytest.mark.parametrize("name", [name for name in MANY if name.startswith("gpt2")])
def test_afm_is_a_principal_component_analysis_of_the_outputs(name: str, rank: int) -> None:
    """With the mean restored, the outputs are the dense ones projected on their own principal components."""
    sample = MANY[name]
    model = tiny_model("gpt2", dtype=torch.float64)
    seen, _ = traces(model, [sample.target.name], tokens(*[26] * 4), None)
    y = torch.cat([trace.y for trace in seen[sample.target.name]]).numpy()
    x = torch.cat([trace.x for trace in seen[sample.target.name]]).numpy()
    centred = y - y.mean(0)
    components = np.linalg.svd(centred)[2][:rank]
    expected = y.mean(0) + centred @ components.T @ components
    # Damping of the smaller side, where that is the input's, changes the metric: hardly any here.
    found = sample.compressed(METHODS["afm"], rank, Damping(gram=1e-13))
    restored = x @ found.T + (sample.weight - found) @ sample.mean("in_mean")
    assert METHODS["afm"].restores_mean(sample.target)
    np.testing.assert_allclose(restored.mean(0), y.mean(0), atol=1e-12)
    np.testing.assert_allclose(restored, expected, atol=1e-6)


def test_afm_restores_no_mean_without_a_bias() -> None:
    sample = MANY["llama:up"]
    assert not METHODS["afm"].restores_mean(sample.target)
    assert METHODS["afm"].statistics(sample.target) == METHODS["svd-llm"].statistics(sample.target)
    plain, uncentred = (sample.compressed(METHODS[method], 6) for method in ("afm", "svd-llm"))
    assert np.array_equal(plain, uncentred)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
def test_a_matrix_that_saw_nothing(method: str, shape: tuple[int, int]) -> None:
    """No gradient and no activation in the sample: the result is finite, and exact at full rank."""
    view = View(Rows(1, shape[0], 0, shape[0]))
    target = Target("m", 0, "m.weight", view, "m.bias", "up", "mlp", shape, "mlp", None)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    means = {}
    for name, entry in STATISTICS.items():
        if entry.fits(target.role):
            means[statistic_key(target, name)] = torch.zeros(entry.shape(target), dtype=torch.float64)
    projector = decompose_target(METHODS[method], target, weight, means, Damping())
    left, right = factors(weight, projector, 6)
    torch.testing.assert_close(left @ right, weight, rtol=0, atol=1e-9)
    assert torch.isfinite(projector.tail()).all()


def test_names_are_said_in_the_table() -> None:
    for name, method in METHODS.items():
        assert method.name == name
        assert method.paper
        assert method.help
        assert method.unit == ("nats" if METRICS[name] == ("out_fisher", "in_gram") else "relative")
        assert method.allocate in ALLOCATORS
    assert {(METHODS[name].allocate, METHODS[name].storage) for name in PAPERS} == {("uniform", "pair")}
