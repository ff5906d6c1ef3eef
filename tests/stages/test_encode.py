"""Which format "auto" takes: the one that loses less once it is stored, at the same stored count."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lowrank_compress.allocation.choice import Choice
from lowrank_compress.config import Scheme
from lowrank_compress.errors import InputError
from lowrank_compress.formats.spec import Encoded
from lowrank_compress.formats.table import rebuild
from lowrank_compress.linalg.metric import Identity
from lowrank_compress.linalg.weighted import decompose
from lowrank_compress.methods.candidates import all_groups, candidates_of
from lowrank_compress.methods.edit import Source
from lowrank_compress.methods.groups import cheaper
from lowrank_compress.methods.matrix_group import MatrixGroup
from lowrank_compress.model.blueprint import blueprint
from lowrank_compress.model.checkpoint import Checkpoint
from tests.tiny import save_tiny

SVD = Scheme(qk="svd", vo="svd", mlp="svd", metric="gram")


@pytest.fixture
def place(tmp_path: Path) -> Checkpoint:
    return Checkpoint(save_tiny("llama", tmp_path))


def encode(group: MatrixGroup, choice: Choice, weight: torch.Tensor, dtype: str, keep: int) -> Encoded:
    source = Source(lambda _: weight, lambda _: weight[:, 0], torch.device("cpu"), getattr(torch, dtype))
    return group.encode(source, choice, bases_of(group, weight, keep)).parts[group.name]


def group_of(place: Checkpoint) -> MatrixGroup:
    groups = all_groups(candidates_of(blueprint(place).resolved, SVD))
    return next(group for group in groups if isinstance(group, MatrixGroup) and group.shape[0] == group.shape[1])


def bases_of(group: MatrixGroup, weight: torch.Tensor, keep: int) -> dict[str, torch.Tensor]:
    projector = decompose(weight @ weight.T, Identity(), keep)
    return {
        f"{group.name}/values": projector.values,
        f"{group.name}/total": torch.tensor(projector.total, dtype=torch.float64),
        f"{group.name}/expand": projector.expand,
        f"{group.name}/out_sensitivity": torch.ones(group.shape[0], dtype=torch.float64),
        f"{group.name}/in_sensitivity": torch.ones(group.shape[1], dtype=torch.float64),
    }


def spectrum(size: int, values: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    left, right = (
        torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator)).Q for _ in range(2)
    )
    return left * values @ right


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("decay", "rank"),
    [(0.95, 8), (0.8, 12), (0.3, 8), (0.3, 16)],  # where little is left to win, rounding decides
)
def test_auto_takes_what_loses_less_once_stored(place: Checkpoint, dtype: str, decay: float, rank: int) -> None:
    group = group_of(place)
    size = group.shape[0]
    weight = spectrum(size, decay ** torch.arange(size, dtype=torch.float64))
    count = group.price(Choice("auto", (rank,))).elements
    losses = {}
    for form in ("pair", "pivot"):
        single = cheaper(group, form, count)
        assert single is not None
        losses[form] = float((rebuild(encode(group, single, weight, dtype, size - 1)) - weight).square().sum())
    chosen = encode(group, Choice("auto", (rank,)), weight, dtype, size - 1)
    # The estimate takes rounding errors for independent: where both formats lose nearly the same, either is right.
    assert losses[chosen.format] <= 1.25 * min(losses.values())
    assert group.price(Choice(chosen.format, chosen.parameters)).elements <= count


def test_a_matrix_of_low_rank_stays_exact(place: Checkpoint) -> None:
    """More rank than the matrix has must not spoil it: both formats are given factors with zero components."""
    group = group_of(place)
    size = group.shape[0]
    weight = spectrum(size, torch.cat([torch.ones(4), torch.zeros(size - 4)]).double())
    made = encode(group, Choice("auto", (12,)), weight, "float32", size - 1)
    assert float((rebuild(made) - weight).square().sum()) < 1e-9


def test_a_rank_above_the_kept_basis_is_refused(place: Checkpoint) -> None:
    group = group_of(place)
    weight = torch.eye(group.shape[0], dtype=torch.float64)
    with pytest.raises(InputError, match=r"asks for rank 9, but its basis was kept up to rank 8"):
        encode(group, Choice("pair", (9,)), weight, "float32", 8)
