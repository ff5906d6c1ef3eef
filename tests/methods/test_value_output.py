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
from lowrank_compress.arch.targets import Heads
from lowrank_compress.errors import InputError
from lowrank_compress.methods.linear import Damping
from lowrank_compress.methods.module import Reduced
from lowrank_compress.methods.value_output import decompose, reduce, statistics
from tests.reference import alternating_least_squares, damp, metric_loss

laws = settings(deadline=None, max_examples=20, derandomize=True)
seeds = st.integers(0, 2**32 - 1)
NONE = Damping(gram=0.0, fisher=0.0)
WIDE = 9


@dataclass
class Attention:
    """Inputs x (tokens, WIDE), gradients at the values g (tokens, key, size), weights and biases."""

    heads: Heads
    x: np.ndarray
    g: np.ndarray
    weights: dict[Role, Tensor]
    biases: dict[Role, Tensor]

    def values(self, reduced: Reduced | None = None) -> np.ndarray:
        """(tokens, key, width), the bias included."""
        weights, biases = (self.weights, self.biases) if reduced is None else (reduced.weights, reduced.biases)
        return (self.x @ weights["v"].numpy().T + biases["v"].numpy()).reshape(len(self.x), self.heads.key, -1)

    def outputs(self, reduced: Reduced | None = None) -> np.ndarray:
        """Return W_o,h, (query, out, width)."""
        weight = (self.weights if reduced is None else reduced.weights)["o"].numpy()
        return weight.reshape(len(weight), self.heads.query, -1).transpose(1, 0, 2)

    def head(self, query: int) -> int:
        return query // (self.heads.query // self.heads.key)

    def written(self, reduced: Reduced | None = None) -> np.ndarray:
        """What each query head writes if it attends to one token alone, (query, tokens, out)."""
        values = self.values(reduced)
        return np.stack([values[:, self.head(h)] @ output.T for h, output in enumerate(self.outputs(reduced))])

    def moments(self) -> dict[str, Tensor]:
        found = {"v/head_gram": self.values(), "v/head_fisher": self.g}
        return {name: torch.from_numpy(np.einsum("thi,thj->hij", y, y) / len(y)) for name, y in found.items()}

    def near(self, fisher: bool) -> np.ndarray:
        """The near metric of each key-value head, (key, size, size)."""
        if fisher:
            return self.moments()["v/head_fisher"].numpy()
        near = np.zeros((self.heads.key, self.heads.size, self.heads.size))
        for h, output in enumerate(self.outputs()):
            near[self.head(h)] += output.T @ output
        return near

    def basis(self, fisher: bool, damping: Damping = NONE) -> dict[str, Tensor]:
        moments = {name: moment for name, moment in self.moments().items() if name[2:] in statistics(fisher)["v"]}
        return decompose(self.heads, self.weights, moments, damping, fisher)

    def reduced(self, basis: Mapping[str, Tensor], width: int) -> Reduced:
        return reduce(self.heads, self.weights, self.biases, basis, width)

    def loss(self, reduced: Reduced, fisher: bool) -> float:
        if not fisher:
            return float(np.sum((self.written() - self.written(reduced)) ** 2) / len(self.x))
        # W_o,h' W_v' = W_o,h Q W_v, with the same Q for the query heads of a group: read it off the stacked slices.
        change = 0.0
        for head in range(self.heads.key):
            mine = [h for h in range(self.heads.query) if self.head(h) == head]
            stacked, small = (np.concatenate([o[h] for h in mine]) for o in (self.outputs(), self.outputs(reduced)))
            errors = self.values()[:, head] - self.values(reduced)[:, head] @ (np.linalg.pinv(stacked) @ small).T
            change += float(np.mean((self.g[:, head] @ errors.T) ** 2))
        return change


def attention(query: int = 4, key: int = 2, size: int = 5, tokens: int = 40, seed: int = 0) -> Attention:
    rng = np.random.default_rng(seed)
    decay = np.arange(1, WIDE + 1) ** -0.5
    return Attention(
        Heads(query, key, size, 0),
        rng.normal(size=(tokens, WIDE)) * decay,
        rng.normal(size=(tokens, key, size)) @ rng.normal(size=(size, size)),
        {
            "v": torch.from_numpy(rng.normal(size=(key * size, WIDE))),
            "o": torch.from_numpy(rng.normal(size=(7, query * size)) * np.exp(rng.normal(size=query * size))),
        },
        {"v": torch.from_numpy(rng.normal(size=key * size)), "o": torch.from_numpy(rng.normal(size=7))},
    )


@pytest.mark.parametrize("fisher", [False, True])
@laws
@given(heads=st.sampled_from([(4, 4), (4, 2), (4, 1), (1, 1)]), size=st.integers(1, 6), seed=seeds)
def test_the_tail_is_the_loss(fisher: bool, heads: tuple[int, int], size: int, seed: int) -> None:
    case = attention(*heads, size, seed=seed)
    basis = case.basis(fisher)
    tail = basis["tail"].numpy()
    assert tail.shape == (size + 1,)
    assert tail[size] == 0
    assert (np.diff(tail) <= 0).all()
    for width in range(size + 1):
        found = case.reduced(basis, width)
        assert found.index is None
        assert found.weights["v"].shape == (heads[1] * width, WIDE)
        assert found.weights["o"].shape == (7, heads[0] * width)
        assert found.biases["v"].shape == (heads[1] * width,)
        assert torch.equal(found.biases["o"], case.biases["o"])
        assert case.loss(found, fisher) == pytest.approx(tail[width], abs=1e-9 * tail[0])


@pytest.mark.parametrize("fisher", [False, True])
@pytest.mark.parametrize("width", [1, 2, 4])
def test_no_local_search_does_better(width: int, fisher: bool) -> None:
    case = attention()
    best = case.basis(fisher)["tail"][width].item()
    grams = case.moments()["v/head_gram"].numpy()
    for seed in range(3):
        rng = np.random.default_rng(seed)
        found = 0.0
        for head, gram in enumerate(grams):
            if fisher:
                stacked, output = np.eye(5), case.near(True)[head]
            else:
                stacked, output = (
                    np.concatenate([case.outputs()[h] for h in range(4) if case.head(h) == head]),
                    np.eye(14),
                )
            product = alternating_least_squares(stacked, output, gram, width, 100, rng)
            found += metric_loss(stacked - product, output, gram)
        assert found >= best * (1 - 1e-9)
        assert found == pytest.approx(best, rel=1e-3)


@pytest.mark.parametrize("fisher", [False, True])
@pytest.mark.parametrize("key", [1, 2, 4])
def test_full_width_reproduces_the_products(key: int, fisher: bool) -> None:
    case = attention(4, key, tokens=3)  # fewer tokens than dimensions: no direction of the values may go
    found = case.reduced(case.basis(fisher, Damping()), 5)
    values, small = (y["v"].numpy().reshape(key, 5, WIDE) for y in (case.weights, found.weights))
    for h, (output, smaller) in enumerate(zip(case.outputs(), case.outputs(found), strict=True)):
        expected = output @ values[case.head(h)]
        np.testing.assert_allclose(smaller @ small[case.head(h)], expected, rtol=0, atol=1e-9)
    np.testing.assert_allclose(case.written(found), case.written(), rtol=0, atol=1e-9)


def test_without_a_bias() -> None:
    case = attention()
    basis = case.basis(False)
    assert reduce(case.heads, case.weights, {}, basis, 3).biases == {}
    only = reduce(case.heads, case.weights, {"o": case.biases["o"]}, basis, 3)
    assert only.biases.keys() == {"o"}


@pytest.mark.parametrize("width", [1, 3, 4])
def test_neither_metric_is_beaten_in_itself(width: int) -> None:
    case = attention()
    plain, fisher = (case.reduced(case.basis(weighted), width) for weighted in (False, True))
    assert case.loss(plain, False) < case.loss(fisher, False) * (1 - 1e-6)
    assert case.loss(fisher, True) < case.loss(plain, True) * (1 - 1e-6)


@pytest.mark.parametrize("fisher", [False, True])
def test_each_metric_has_its_own_damping(fisher: bool) -> None:
    case = attention()
    damping = Damping(gram=0.02, fisher=0.3)
    tail = case.basis(fisher, damping)["tail"].numpy()
    expected = np.zeros(6)
    for near, gram in zip(case.near(fisher), case.moments()["v/head_gram"].numpy(), strict=True):
        values = np.linalg.eigvals(damp(near, 0.3 if fisher else 0.02) @ gram).real
        expected += np.append(np.sort(values)[::-1], 0)[::-1].cumsum()[::-1]
    np.testing.assert_allclose(tail, expected, rtol=1e-9, atol=1e-9 * expected[0])


def test_both_sides_carry_the_same_weight() -> None:
    case = attention(4, 1)
    case.g *= 1e-4
    found = case.reduced(case.basis(True), 3)
    outputs = np.concatenate(list(case.outputs(found)))
    np.testing.assert_allclose(np.linalg.norm(found.weights["v"].numpy(), axis=1), np.linalg.norm(outputs, axis=0))


def test_a_head_that_nothing_reads() -> None:
    case = attention()
    case.weights["o"][:, :10] = 0  # the first key-value head
    basis = case.basis(False)
    assert torch.isfinite(basis["tail"]).all()
    found = case.reduced(basis, 5)
    np.testing.assert_allclose(case.written(found), case.written(), rtol=0, atol=1e-9)
    assert np.isfinite(found.weights["v"].numpy()).all()


def test_what_cannot_be_done() -> None:
    case = attention()
    for width in (-1, 6):
        with pytest.raises(InputError, match=rf"width of these values must lie between 0 and 5, got {width}"):
            case.reduced(case.basis(False), width)
