"""The joint factors of keys and values: against an explicit Kronecker metric, and as a target group."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from lowrank_compress.allocation.choice import Choice
from lowrank_compress.arch.targets import Heads, Rows, Target, View
from lowrank_compress.calibration.statistics import HALVES
from lowrank_compress.errors import InputError
from lowrank_compress.linalg.heldout import ISOTROPIC
from lowrank_compress.linalg.weighted import factors
from lowrank_compress.methods.edit import Source
from lowrank_compress.methods.groups import dense_elements
from lowrank_compress.methods.joint import joint
from lowrank_compress.methods.latent import LatentGroup
from lowrank_compress.methods.linear import Damping
from lowrank_compress.stages.cachebudget import cached_at
from tests.reference import damp, weighted_svd

DAMPING = Damping(fisher=1e-3, gram=1e-2)
# Keys and values together have fewer rows than columns, and more.
SHAPES = [(3, 8), (6, 8)]


def moment(size: int, seed: int, rank: int = 99) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(rank, size)) * np.linspace(0.2, 2, size)
    return rows.T @ rows / rank


def group(kv: int, hidden: int, window: int = 0) -> LatentGroup:
    def target(role: str) -> Target:
        name, view = f"block.{role}_proj", View(Rows(1, kv, 0, kv))
        return Target(name, 0, f"{name}.weight", view, None, role, "qk", (kv, hidden), "attn", Heads(1, 1, kv, 0))

    return LatentGroup("block:key-value", (target("k"), target("v")), window)


def means(kv: int, hidden: int) -> dict[str, Tensor]:
    found = {"attn/in_gram": (hidden, 1), "block.k_proj/out_fisher": (kv, 2), "block.v_proj/out_fisher": (kv, 3)}
    return {name: torch.from_numpy(moment(size, seed)) for name, (size, seed) in found.items()}


def fisher(found: dict[str, Tensor]) -> np.ndarray:
    return torch.block_diag(found["block.k_proj/out_fisher"], found["block.v_proj/out_fisher"]).numpy()


def weights(kv: int, hidden: int) -> dict[str, Tensor]:
    rng = np.random.default_rng(5)
    return {f"block.{role}_proj": torch.from_numpy(rng.normal(size=(kv, hidden))) for role in "kv"}


@pytest.mark.parametrize(("kv", "hidden"), SHAPES)
def test_it_is_the_best_in_a_kronecker_metric(kv: int, hidden: int) -> None:
    found, matrices = means(kv, hidden), weights(kv, hidden)
    weight = torch.cat(list(matrices.values()))
    whole, gram = fisher(found), found["attn/in_gram"].numpy()
    projector = joint(weight, found["attn/in_gram"], torch.from_numpy(whole), DAMPING)
    tail = projector.tail()
    damped, inputs = damp(whole, DAMPING.fisher), damp(gram, DAMPING.gram)
    metric = np.kron(damped, inputs)  # of an error (2 · kv, hidden) in its rows' order
    assert len(tail) == min(2 * kv, hidden) + 1
    for rank in range(len(tail)):
        left, right = factors(weight, projector, rank)
        best = weighted_svd(weight.numpy(), damped, inputs, rank)
        np.testing.assert_allclose((left @ right).numpy(), best, atol=1e-9)
        error = (weight - left @ right).numpy().ravel()
        np.testing.assert_allclose(error @ metric @ error, tail[rank], rtol=1e-7, atol=1e-10)


def test_together_they_lose_less_than_apart() -> None:
    found, matrices = means(3, 8), weights(3, 8)
    gram = found["attn/in_gram"]
    both = joint(torch.cat(list(matrices.values())), gram, torch.from_numpy(fisher(found)), DAMPING).tail()
    apart = [joint(matrix, gram, found[f"{name}/out_fisher"], DAMPING).tail() for name, matrix in matrices.items()]
    for rank in range(1, 6):
        best = min(apart[0][one] + apart[1][rank - one] for one in range(4) if 0 <= rank - one <= 3)
        assert both[rank] <= best + 1e-9
    assert both[2] < 0.99 * (apart[0][1] + apart[1][1])


def test_a_group_counts_what_is_cached() -> None:
    own, beside = group(3, 8), group(3, 8, window=4)
    assert own.choices("latent").parameters[:, 0].tolist() == [1, 2, 3, 4, 5]
    assert own.choices("latent").stored.tolist() == [1, 2, 3, 4, 5]
    assert own.choices("latent", 2).parameters[:, 0].tolist() == [2, 4]
    # A latent of as many numbers as the hidden state has loses nothing.
    assert group(6, 8).choices("latent").parameters[:, 0].tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert own.price(Choice("latent", (2,))).elements == 2 * (6 + 8)
    assert [cached_at(own, choice) for choice in (Choice("latent", (2,)), Choice("dense"))] == [2, 6]
    assert (own.cached, own.beside, beside.beside) == (6, False, True)
    assert (dense_elements(own), dense_elements(beside)) == (48, 0)


@pytest.mark.parametrize("window", [0, 4])
def test_a_basis_and_what_is_made_of_it(window: int) -> None:
    own, found, matrices = group(3, 8, window), means(3, 8), weights(3, 8)
    basis = own.decompose(lambda target: matrices[target.name], found, DAMPING, 4)
    weight = torch.cat(list(matrices.values()))
    tail = joint(weight, found["attn/in_gram"], torch.from_numpy(fisher(found)), DAMPING).tail()
    np.testing.assert_allclose(own.losses(basis, own.choices("latent")), tail[1:5], rtol=1e-9)
    assert own.total(basis) == pytest.approx(float(tail[0]))
    assert own.kept({name: tensor.shape for name, tensor in basis.items()}) == 4
    source = Source(lambda target: matrices[target.name], lambda target: Tensor(), torch.device("cpu"), torch.float32)
    edit = own.encode(source, Choice("latent", (3,)), basis)
    assert edit.remembered is not None
    assert (edit.remembered.rank, edit.remembered.window) == (3, window)
    product = edit.remembered.outer.double() @ edit.remembered.inner.double()
    best = weighted_svd(
        weight.numpy(),
        damp(fisher(found), DAMPING.fisher),
        damp(found["attn/in_gram"].numpy(), DAMPING.gram),
        3,
    )
    np.testing.assert_allclose(product, best, atol=1e-5)
    assert sorted(edit.parts) == ([] if window else ["block.k_proj", "block.v_proj"])
    replaced = own.replace(source, Choice("latent", (3,)), basis)
    assert [each.target.role for each in replaced] == ([] if window else ["k", "v"])
    if replaced:
        np.testing.assert_allclose(torch.cat([each.weight for each in replaced]), best, atol=1e-5)
    with pytest.raises(InputError, match="asks for rank 5, but its basis was kept up to rank 4"):
        own.encode(source, Choice("latent", (5,)), basis)


@pytest.mark.parametrize(("kv", "hidden"), SHAPES)
def test_losses_are_taken_on_other_text(kv: int, hidden: int) -> None:
    own, matrices = group(kv, hidden), weights(kv, hidden)
    halves = [
        {
            name: torch.from_numpy(moment(len(each), seed + number, rank=5))
            for number, (name, each) in enumerate(means(kv, hidden).items())
        }
        for seed in (20, 30)
    ]
    both = {name: (halves[0][name] + halves[1][name]) / 2 for name in halves[0]}
    both |= {f"{name}@first": each for name, each in halves[0].items()} | {HALVES: torch.tensor([0.5, 0.5]).double()}
    basis = own.decompose(lambda target: matrices[target.name], both, DAMPING, min(2 * kv, hidden))
    weight = torch.cat(list(matrices.values()))

    def losses(damping: Damping) -> np.ndarray:
        """Fit on one half, the loss on the other one, both ways."""
        found = np.zeros(min(2 * kv, hidden) + 1)
        for fit, other in (halves, halves[::-1]):
            projector = joint(weight, fit["attn/in_gram"], torch.from_numpy(fisher(fit)), damping)
            metric = np.kron(damp(fisher(other), ISOTROPIC), damp(other["attn/in_gram"].numpy(), ISOTROPIC))
            for rank in range(len(found)):
                left, right = factors(weight, projector, rank)
                error = (weight - left @ right).numpy().ravel()
                found[rank] += error @ metric @ error / 2
        return found

    tried = [
        np.minimum.accumulate(losses(Damping(one, other)))
        for one in (1e-3, 1e-2, 1e-1, 1.0)
        for other in (1e-2, 1e-1, 1.0)
    ]
    said = own.tail(basis).numpy()
    assert min(np.abs(said - each).max() for each in tried) < 1e-8
    assert said[1] <= tried[0][1] * 1.5
    assert not np.allclose(own.tail(basis, on_sample=True), said)
