from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from lowrank_compress.arch.spec import Role
from lowrank_compress.arch.targets import Heads
from lowrank_compress.errors import InputError
from lowrank_compress.methods.cr import decompose, reduce, statistics
from lowrank_compress.methods.linear import Damping
from lowrank_compress.methods.module import Reduced

WIDE = 11


@dataclass
class Attention:
    """Inputs x (tokens, WIDE), gradients at the queries (tokens, query, size), weights and biases."""

    heads: Heads
    x: np.ndarray
    g: np.ndarray
    weights: dict[Role, Tensor]
    biases: dict[Role, Tensor]

    def projected(self, role: Role, reduced: Reduced | None = None) -> np.ndarray:
        """(tokens, heads, width)."""
        weights, biases = (self.weights, self.biases) if reduced is None else (reduced.weights, reduced.biases)
        count = self.heads.query if role == "q" else self.heads.key
        return (self.x @ weights[role].numpy().T + biases[role].numpy()).reshape(len(self.x), count, -1)

    def moments(self, fisher: bool) -> dict[str, Tensor]:
        if fisher:
            t = self.scores_felt()
            return {"q/score_fisher": torch.from_numpy(np.einsum("thi,thj->hij", t, t) / len(t))}
        found = {role: self.projected(role) for role in ("q", "k")}
        return {
            f"{role}/head_gram": torch.from_numpy(np.einsum("thi,thj->hij", y, y) / len(y)) for role, y in found.items()
        }

    def scores_felt(self) -> np.ndarray:
        """t = Σ g∘q over the query heads of a group, (tokens, key, size)."""
        product = self.g * self.projected("q")
        return product.reshape(len(product), self.heads.key, -1, self.heads.size).sum(2)

    def basis(self, fisher: bool) -> dict[str, Tensor]:
        moments = self.moments(fisher)
        wanted = {f"{role}/{name}" for role, names in statistics(fisher).items() for name in names}
        assert wanted == moments.keys()
        return decompose(self.heads, self.weights, moments, Damping(), fisher)

    def reduced(self, basis: Mapping[str, Tensor], width: int) -> Reduced:
        return reduce(self.heads, self.weights, self.biases, basis, width)

    def dimensions(self, reduced: Reduced) -> np.ndarray:
        """(key, width): which dimension each kept one is, found by its row of W_k."""
        dense = self.weights["k"].view(self.heads.key, self.heads.size, 1, WIDE)
        rows = reduced.weights["k"].view(self.heads.key, 1, -1, WIDE)
        return (dense == rows).all(-1).int().argmax(1).numpy()


def attention(query: int, key: int, size: int, rotary: int, tokens: int = 15, seed: int = 0) -> Attention:
    rng = np.random.default_rng(seed)
    scale = np.exp(rng.normal(size=(query + key) * size))
    weight, bias = rng.normal(size=(len(scale), WIDE)) * scale[:, None], rng.normal(size=len(scale)) * scale
    split = query * size
    return Attention(
        Heads(query, key, size, rotary),
        rng.normal(size=(tokens, WIDE)),
        rng.normal(size=(tokens, query, size)) * np.exp(rng.normal(size=(query, size))),
        {"q": torch.from_numpy(weight[:split]), "k": torch.from_numpy(weight[split:])},
        {"q": torch.from_numpy(bias[:split]), "k": torch.from_numpy(bias[split:])},
    )


def scores(queries: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """(query, tokens, tokens): of every query with every key."""
    return np.einsum("thi,shi->hts", queries, np.repeat(keys, queries.shape[1] // keys.shape[1], axis=1))


def running_maximum(achieved: list[np.ndarray]) -> np.ndarray:
    """Sum over heads of the maximum over this and all larger widths: where dimensions cancel, losing more is less."""
    return np.maximum.accumulate(np.array(achieved)[::-1])[::-1].sum(1)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("key", [1, 2, 4])
def test_the_tail_is_the_energy_of_the_scores_that_go(key: int, seed: int) -> None:
    case = attention(4, key, 7, 0, seed=seed)
    basis = case.basis(False)
    dense = scores(case.projected("q"), case.projected("k"))
    achieved = []
    for width in range(8):
        found = case.reduced(basis, width)
        assert found.index is None
        change = dense - scores(case.projected("q", found), case.projected("k", found))
        achieved.append(np.mean(change**2, axis=(1, 2)).reshape(key, -1).sum(1))
    tail = basis["tail"].numpy()
    assert tail[7] == 0
    assert (np.diff(tail) <= 0).all()
    np.testing.assert_allclose(tail, running_maximum(achieved), rtol=1e-9, atol=1e-12 * tail[0])


@pytest.mark.parametrize("rotary", [0, 6, 4])
@pytest.mark.parametrize("seed", range(3))
def test_the_fisher_tail_is_twice_the_loss_to_second_order(rotary: int, seed: int) -> None:
    case = attention(4, 2, 6, rotary, seed=seed)
    basis = case.basis(True)
    widths = range(0, 7, 2 if rotary else 1)
    achieved = []
    for width in widths:
        left = case.scores_felt()
        for head, dimensions in enumerate(case.dimensions(case.reduced(basis, width))):
            left[:, head, dimensions] = 0
        achieved.append(np.mean(left.sum(2) ** 2, axis=0))
    tail = basis["tail"].numpy()
    assert tail[6] == 0
    np.testing.assert_allclose(tail[list(widths)], running_maximum(achieved), rtol=1e-9, atol=1e-12 * tail[0])


def turned(keys: np.ndarray, angles: tuple[float, ...]) -> np.ndarray:
    """Rotate dimension i with i + 3 of keys (tokens, heads, 6)."""
    first, second = keys[..., :3], keys[..., 3:]
    cosine, sine = np.cos(angles), np.sin(angles)
    return np.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)


@pytest.mark.parametrize("key", [1, 2])
def test_with_rotary_embeddings_the_tail_is_the_mean_over_all_angles(key: int) -> None:
    case = attention(2, key, 6, 6)
    basis = case.basis(False)
    # Quarter turns, each unit by its own, have the same means as all angles. Whole units go, so it is the same before
    # and after the rotation.
    angles = list(itertools.product(np.arange(4) * np.pi / 2, repeat=3))
    for width in (0, 2, 4, 6):
        index = case.reduced(basis, width).index
        assert index is not None
        dropped = np.ones((key, 6))
        np.put_along_axis(dropped, index.numpy(), 0, axis=1)
        energy = [
            np.sum(np.mean(scores(case.projected("q"), turned(case.projected("k") * dropped, turn)) ** 2, axis=(1, 2)))
            for turn in angles
        ]
        assert basis["tail"][width].item() == pytest.approx(np.mean(energy), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(("rotary", "paired"), [(0, 1), (8, 2), (4, 2)])
@pytest.mark.parametrize("diagonal", [True, False])
def test_against_the_best_of_all_subsets(rotary: int, paired: int, diagonal: bool) -> None:
    case = attention(2, 1, 8, rotary)
    moments = case.moments(False)
    if diagonal:
        moments = {name: torch.diag_embed(moment.diagonal(dim1=1, dim2=2)) for name, moment in moments.items()}
    basis = decompose(case.heads, case.weights, moments, Damping(), False)
    queries, keys = moments["q/head_gram"].sum(0).numpy(), moments["k/head_gram"][0].numpy()
    if paired == 1:
        units, cost = [(i,) for i in range(8)], queries * keys
    else:
        units = [(i, i + rotary // 2) for i in range(rotary // 2)] + [(i, i + 1) for i in range(rotary, 8, 2)]
        sums = [np.array([sum(moment[i, i] for i in unit) for unit in units]) for moment in (queries, keys)]
        cost = np.diag(sums[0] * sums[1] / 2)
    for width in range(0, 9, paired):
        best = min(
            sum(cost[i, j] for i in some for j in some)
            for some in itertools.combinations(range(len(units)), len(units) - width // paired)
        )
        found = basis["tail"][width].item()
        assert found >= best * (1 - 1e-12)
        if diagonal or paired == 2:
            assert found == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize("fisher", [False, True])
@pytest.mark.parametrize(("size", "rotary"), [(8, 8), (8, 4), (6, 2), (8, 0)])
@pytest.mark.parametrize("key", [1, 2, 4])
def test_heads_keep_whole_units_and_groups_keep_the_same(fisher: bool, size: int, rotary: int, key: int) -> None:
    case = attention(4, key, size, rotary)
    partner = {i: i + rotary // 2 for i in range(rotary // 2)} | {i: i + 1 for i in range(rotary, size, 2)}
    basis = case.basis(fisher)
    assert basis["order"].shape == (key, size // 2 if rotary else size)
    assert basis["order"].dtype == torch.int64
    for width in range(0, size + 1, 2 if rotary else 1):
        found = case.reduced(basis, width)
        index = case.dimensions(found)
        if rotary:
            assert found.index is not None
            assert found.index.dtype == torch.int64
            assert found.index.tolist() == index.tolist()
            for row in index.tolist():
                first, second = row[: width // 2], row[width // 2 :]
                assert first == sorted(first)
                assert second == [partner[i] for i in first]
        else:
            assert found.index is None
            assert index.tolist() == np.sort(index, axis=1).tolist()
        for role, count in (("q", 4), ("k", key)):
            dense, bias = case.weights[role].view(count, size, WIDE), case.biases[role].view(count, size)
            small, offset = found.weights[role].view(count, width, WIDE), found.biases[role].view(count, width)
            for head in range(count):
                dimensions = index[head * key // count]
                assert torch.equal(small[head], dense[head, dimensions])
                assert torch.equal(offset[head], bias[head, dimensions])
        assert reduce(case.heads, case.weights, {}, basis, width).biases == {}


def test_odd_widths_have_the_tail_of_the_next_lower_even_one() -> None:
    tail = attention(4, 2, 8, 4).basis(False)["tail"]
    assert tail.shape == (9,)
    assert torch.equal(tail[1::2], tail[0:8:2])
    assert tail[8] == 0


def test_what_cannot_be_done() -> None:
    case = attention(4, 2, 8, 4)
    basis = case.basis(False)
    for width in (-2, 3, 10):
        with pytest.raises(InputError, match=rf"between 0 and 8 and be even, .* in pairs, got {width}"):
            case.reduced(basis, width)
    plain = attention(4, 2, 8, 0)
    with pytest.raises(InputError, match="between 0 and 8, got 9"):
        plain.reduced(plain.basis(False), 9)
    odd = attention(4, 2, 7, 4)
    with pytest.raises(InputError, match="size 7 with 4 rotated dimensions"):
        odd.basis(False)
