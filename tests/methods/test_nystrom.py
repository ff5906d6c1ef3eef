from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowrank_compress.arch.spec import Role
from lowrank_compress.errors import InputError, NumericsError
from lowrank_compress.methods import nystrom
from lowrank_compress.methods.linear import Damping
from lowrank_compress.methods.nystrom import decompose, reduce, statistics
from tests.reference import damp

laws = settings(deadline=None, max_examples=25, derandomize=True)
seeds = st.integers(0, 2**32 - 1)
NONE = Damping(gram=0.0)


@dataclass
class Mlp:
    """Hidden units h (tokens, n), gradients g (tokens, m), and the weights around them."""

    h: np.ndarray
    g: np.ndarray
    weights: dict[Role, Tensor]
    biases: dict[Role, Tensor]

    @property
    def down(self) -> np.ndarray:
        return self.weights["down"].numpy()

    @property
    def gram(self) -> np.ndarray:
        return self.h.T @ self.h / len(self.h)

    @property
    def form(self) -> np.ndarray:
        return self.g.T @ self.g / len(self.g)

    def basis(self, fisher: bool, damping: Damping = NONE) -> dict[str, Tensor]:
        moments = {"down/in_gram": torch.from_numpy(self.gram)}
        if fisher:
            moments["down/out_fisher"] = torch.from_numpy(self.form)
        assert {key.partition("/")[2] for key in moments} == set(statistics(fisher)["down"])
        return decompose(None, self.weights, moments, damping, fisher)

    def reduced(self, basis: Mapping[str, Tensor], width: int) -> np.ndarray:
        return reduce(None, self.weights, self.biases, basis, width).weights["down"].numpy()

    def loss(self, kept: np.ndarray, down: np.ndarray, fisher: bool) -> float:
        """Mean over tokens of the squared error, or over gradients as well of the squared change of the loss."""
        error = self.h @ self.down.T - self.h[:, kept] @ down.T
        if not fisher:
            return float(np.mean(np.sum(error**2, axis=1)))
        return float(np.mean((self.g @ error.T) ** 2))


def mlp(units: int = 12, outputs: int = 5, tokens: int = 60, seed: int = 0, gated: bool = True) -> Mlp:
    rng = np.random.default_rng(seed)

    def sample(size: int) -> np.ndarray:
        return (rng.normal(size=(tokens, size)) * np.arange(1, size + 1) ** -0.5) @ rng.normal(size=(size, size))

    roles: list[Role] = ["gate", "up", "down"] if gated else ["up", "down"]
    shapes = {"gate": (units, outputs), "up": (units, outputs), "down": (outputs, units)}
    return Mlp(
        sample(units),
        sample(outputs),
        {role: torch.from_numpy(rng.normal(size=shapes[role])) for role in roles},
        {role: torch.from_numpy(rng.normal(size=shapes[role][0])) for role in roles},
    )


def kept(basis: Mapping[str, Tensor], width: int) -> np.ndarray:
    return np.sort(basis["order"][:width].numpy())


@pytest.mark.parametrize("fisher", [False, True])
@laws
@given(units=st.integers(1, 14), outputs=st.integers(1, 9), seed=seeds)
def test_is_the_regression_on_the_units_that_stay(fisher: bool, units: int, outputs: int, seed: int) -> None:
    case = mlp(units, outputs, seed=seed)
    basis = case.basis(fisher)
    tail = basis["tail"].numpy()
    assert tail.shape == (units + 1,)
    assert tail[units] == 0
    assert (np.diff(tail) <= 0).all()
    for width in range(units + 1):
        found = case.reduced(basis, width)
        best = np.linalg.lstsq(case.h[:, kept(basis, width)], case.h @ case.down.T, rcond=None)[0].T
        np.testing.assert_allclose(found, best, rtol=0, atol=1e-8 * max(np.abs(best).max(initial=0), 1))
        assert case.loss(kept(basis, width), found, fisher) == pytest.approx(tail[width], abs=1e-9 * tail[0])


@pytest.mark.parametrize("fisher", [False, True])
def test_panels_and_the_moments_are_left_alone(fisher: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    case = mlp()
    expected = case.basis(fisher)
    monkeypatch.setattr(nystrom, "PANEL", 5)
    gram, form = torch.from_numpy(case.gram), torch.from_numpy(case.form)
    before = gram.clone(), form.clone()
    moments = {"down/in_gram": gram, "down/out_fisher": form}
    found = decompose(None, case.weights, moments, NONE, fisher)
    torch.testing.assert_close(found, expected)
    assert torch.equal(gram, before[0])
    assert torch.equal(form, before[1])


@pytest.mark.parametrize("fisher", [False, True])
def test_damping_is_that_of_the_metric(fisher: bool) -> None:
    case = mlp()
    basis = case.basis(fisher, Damping(gram=0.05))
    gram = damp(case.gram, 0.05)
    form = case.form if fisher else np.eye(5)
    for width in (0, 4, 9, 12):
        j = kept(basis, width)
        expected = case.down @ gram[:, j] @ np.linalg.inv(gram[np.ix_(j, j)])
        np.testing.assert_allclose(case.reduced(basis, width), expected, rtol=0, atol=1e-11)
        error = case.down.copy()
        error[:, j] -= expected
        loss = np.trace(form @ error @ gram @ error.T)
        assert basis["tail"][width].item() == pytest.approx(loss, abs=1e-10)


@pytest.mark.parametrize("gated", [True, False])
def test_gate_and_up_lose_rows_and_the_bias_of_down_stays(gated: bool) -> None:
    case = mlp(gated=gated)
    basis = case.basis(True)
    for width in (0, 1, 7, 12):
        found = reduce(None, case.weights, case.biases, basis, width)
        assert found.index is None
        assert found.weights.keys() == found.biases.keys() == case.weights.keys()
        j = kept(basis, width)
        for role in ("gate", "up") if gated else ("up",):
            assert torch.equal(found.weights[role], case.weights[role][j])
            assert torch.equal(found.biases[role], case.biases[role][j])
        assert found.weights["down"].shape == (5, width)
        assert torch.equal(found.biases["down"], case.biases["down"])
    assert torch.equal(found.weights["down"], case.weights["down"])
    assert reduce(None, case.weights, {}, basis, 7).biases == {}


def test_the_plain_order_is_that_of_ridge_leverage_scores() -> None:
    case = mlp(30, 8)
    gram = case.gram
    scores = np.diag(gram @ np.linalg.inv(gram + np.mean(np.diag(gram)) * np.eye(30)))
    assert case.basis(False)["order"].tolist() == np.argsort(-scores).tolist()


def test_the_fisher_order_loses_less_in_its_metric() -> None:
    ratios = []
    for seed in range(6):
        case = mlp(40, 10, tokens=300, seed=seed)
        basis, plain = case.basis(True), case.basis(False)
        for width in (12, 20, 28, 36):
            other = case.loss(kept(plain, width), case.reduced(plain, width), True)
            ratios.append(basis["tail"][width].item() / other)
    assert np.exp(np.mean(np.log(ratios))) < 0.8
    assert np.mean(np.array(ratios) < 1) > 0.9


@pytest.mark.parametrize("gram", [0.0, 1e-6])
@pytest.mark.parametrize("fisher", [False, True])
def test_fewer_tokens_than_units(fisher: bool, gram: float) -> None:
    case = mlp(40, 10, tokens=9)
    basis = case.basis(fisher, Damping(gram=gram))
    tail = basis["tail"].numpy()
    assert np.isfinite(tail).all()
    for width in (3, 8, 9, 12, 30):
        found = case.reduced(basis, width)
        assert np.abs(found).max() < 100 * np.abs(case.down).max()
        loss = case.loss(kept(basis, width), found, fisher)
        assert loss <= tail[width] + 1e-9 * tail[0]
        # Nine tokens span nine dimensions, and nine units that are well chosen span them too.
        assert (loss < 1e-5 * tail[0]) == (width >= 9)
    np.testing.assert_array_equal(case.reduced(basis, 40), case.down)


def test_units_that_are_never_active_go_first() -> None:
    case = mlp(12, 5)
    case.h[:, [2, 7]] = 0
    for fisher in (False, True):
        assert set(case.basis(fisher)["order"][-2:].tolist()) == {2, 7}


def test_nothing_is_lost_by_keeping_the_root_in_float32() -> None:
    case = mlp(60, 20, tokens=400)
    basis = case.basis(True)
    stored = basis | {"root": basis["root"].float()}
    for width in (20, 40, 55):
        loss = case.loss(kept(basis, width), case.reduced(stored, width), True)
        assert loss == pytest.approx(basis["tail"][width].item(), rel=1e-9)


def test_what_cannot_be_done() -> None:
    case = mlp()
    basis = case.basis(False)
    for width in (-1, 13):
        with pytest.raises(InputError, match=rf"width of this MLP must lie between 0 and 12, got {width}"):
            reduce(None, case.weights, case.biases, basis, width)
    case.h[0, 0] = np.nan
    with pytest.raises(NumericsError, match="must be finite"):
        case.basis(False)
