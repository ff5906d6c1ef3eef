"""Which format "auto" takes: the one that loses less once it is stored, at the same stored count."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lowrank_compress.allocation.storage import cost
from lowrank_compress.arch.resolve import Target
from lowrank_compress.config import FactorizeConfig
from lowrank_compress.errors import InputError
from lowrank_compress.linalg.metric import Identity
from lowrank_compress.linalg.weighted import decompose
from lowrank_compress.model.blueprint import blueprint
from lowrank_compress.model.checkpoint import Checkpoint
from lowrank_compress.stages.encode import Encoder
from lowrank_compress.stages.ranks import Choice
from tests.tiny import save_tiny


@pytest.fixture
def place(tmp_path: Path) -> Checkpoint:
    return Checkpoint(save_tiny("llama", tmp_path))


def encoder(place: Checkpoint, dtype: str) -> Encoder:
    return Encoder(blueprint(place), FactorizeConfig(method="svd", storage="auto", dtype=dtype, device="cpu"))


def target_of(place: Checkpoint) -> Target:
    return next(target for target in blueprint(place).resolved.targets if target.shape[0] == target.shape[1])


def bases_of(target: Target, weight: torch.Tensor, keep: int) -> dict[str, torch.Tensor]:
    projector = decompose(weight @ weight.T, Identity(), keep)
    return {
        f"{target.name}/values": projector.values,
        f"{target.name}/total": torch.tensor(projector.total, dtype=torch.float64),
        f"{target.name}/expand": projector.expand,
        f"{target.name}/out_sensitivity": torch.ones(target.shape[0], dtype=torch.float64),
        f"{target.name}/in_sensitivity": torch.ones(target.shape[1], dtype=torch.float64),
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
    target = target_of(place)
    size = target.shape[0]
    weight = spectrum(size, decay ** torch.arange(size, dtype=torch.float64))
    bases, made = bases_of(target, weight, size - 1), encoder(place, dtype)
    count = cost("auto", target.shape, rank)
    losses = {}
    for form in ("pair", "pivot"):
        possible = [r for r in range(1, size) if cost(form, target.shape, r) <= count]
        part = made.encode(target, Choice(form, max(possible)), weight, bases)
        losses[form] = float((part.rebuild() - weight).square().sum())
    chosen = made.encode(target, Choice("auto", rank), weight, bases)
    # The estimate takes rounding errors for independent: where both formats lose nearly the same, either is right.
    assert losses[chosen.format] <= 1.25 * min(losses.values())
    assert cost(chosen.format, target.shape, chosen.rank) <= count


def test_a_matrix_of_low_rank_stays_exact(place: Checkpoint) -> None:
    """More rank than the matrix has must not spoil it: both formats are given factors with zero components."""
    target = target_of(place)
    size = target.shape[0]
    weight = spectrum(size, torch.cat([torch.ones(4), torch.zeros(size - 4)]).double())
    made = encoder(place, "float32").encode(target, Choice("auto", 12), weight, bases_of(target, weight, size - 1))
    assert float((made.rebuild() - weight).square().sum()) < 1e-9


def test_a_rank_above_the_kept_basis_is_refused(place: Checkpoint) -> None:
    target = target_of(place)
    weight = torch.eye(target.shape[0], dtype=torch.float64)
    with pytest.raises(InputError, match=r"asks for rank 9, but its basis was kept up to rank 8"):
        encoder(place, "float32").encode(target, Choice("pair", 9), weight, bases_of(target, weight, 8))
