"""Which format "auto" takes: the one that loses less once it is stored, at the same stored count."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lowrank_compress.allocation.storage import cost
from lowrank_compress.config import FactorizeConfig, Scheme
from lowrank_compress.errors import InputError
from lowrank_compress.linalg.metric import Identity
from lowrank_compress.linalg.weighted import decompose
from lowrank_compress.methods.matrix_unit import MatrixUnit
from lowrank_compress.methods.sites import all_units, sites_of
from lowrank_compress.model.blueprint import blueprint
from lowrank_compress.model.checkpoint import Checkpoint
from lowrank_compress.stages.encode import Encoder
from lowrank_compress.stages.ranks import Choice
from tests.tiny import save_tiny

SVD = Scheme(qk="svd", vo="svd", mlp="svd", metric="gram")


@pytest.fixture
def place(tmp_path: Path) -> Checkpoint:
    return Checkpoint(save_tiny("llama", tmp_path))


def encoder(place: Checkpoint, dtype: str) -> Encoder:
    config = FactorizeConfig(method="svd", scheme=SVD, storage="auto", round_to=1, dtype=dtype, device="cpu")
    return Encoder(blueprint(place), all_units(sites_of(blueprint(place).resolved, SVD)), config)


def unit_of(place: Checkpoint) -> MatrixUnit:
    units = all_units(sites_of(blueprint(place).resolved, SVD))
    return next(unit for unit in units if isinstance(unit, MatrixUnit) and unit.shape[0] == unit.shape[1])


def bases_of(unit: MatrixUnit, weight: torch.Tensor, keep: int) -> dict[str, torch.Tensor]:
    projector = decompose(weight @ weight.T, Identity(), keep)
    return {
        f"{unit.name}/values": projector.values,
        f"{unit.name}/total": torch.tensor(projector.total, dtype=torch.float64),
        f"{unit.name}/expand": projector.expand,
        f"{unit.name}/out_sensitivity": torch.ones(unit.shape[0], dtype=torch.float64),
        f"{unit.name}/in_sensitivity": torch.ones(unit.shape[1], dtype=torch.float64),
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
    unit = unit_of(place)
    size = unit.shape[0]
    weight = spectrum(size, decay ** torch.arange(size, dtype=torch.float64))
    bases, made = bases_of(unit, weight, size - 1), encoder(place, dtype)
    count = cost("auto", unit.shape, rank)
    losses = {}
    for form in ("pair", "pivot"):
        possible = [r for r in range(1, size) if cost(form, unit.shape, r) <= count]
        part = made.encode(unit, Choice(form, max(possible)), weight, bases)
        losses[form] = float((part.rebuild() - weight).square().sum())
    chosen = made.encode(unit, Choice("auto", rank), weight, bases)
    # The estimate takes rounding errors for independent: where both formats lose nearly the same, either is right.
    assert losses[chosen.format] <= 1.25 * min(losses.values())
    assert cost(chosen.format, unit.shape, chosen.rank) <= count


def test_a_matrix_of_low_rank_stays_exact(place: Checkpoint) -> None:
    """More rank than the matrix has must not spoil it: both formats are given factors with zero components."""
    unit = unit_of(place)
    size = unit.shape[0]
    weight = spectrum(size, torch.cat([torch.ones(4), torch.zeros(size - 4)]).double())
    made = encoder(place, "float32").encode(unit, Choice("auto", 12), weight, bases_of(unit, weight, size - 1))
    assert float((made.rebuild() - weight).square().sum()) < 1e-9


def test_a_rank_above_the_kept_basis_is_refused(place: Checkpoint) -> None:
    unit = unit_of(place)
    weight = torch.eye(unit.shape[0], dtype=torch.float64)
    with pytest.raises(InputError, match=r"asks for rank 9, but its basis was kept up to rank 8"):
        encoder(place, "float32").encode(unit, Choice("pair", 9), weight, bases_of(unit, weight, 8))
