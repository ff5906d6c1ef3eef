from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lowrank_compress.errors import InputError
from lowrank_compress.linalg.intruders import intruder_dimensions


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tuned(base: Tensor, size: float) -> Tensor:
    """Something of rank 2 added, of a size."""
    return base + size * random(len(base), 2, seed=1) @ random(2, base.shape[1], seed=2)


@pytest.mark.parametrize("shape", [(20, 30), (30, 20)])
def test_each_cosine_by_itself(shape: tuple[int, int]) -> None:
    base = random(*shape)
    matrix = tuned(base, 2.0)
    found = intruder_dimensions(matrix, base, top=5, epsilon=0.6)
    left, known = (torch.linalg.svd(each)[0] for each in (matrix, base))
    expected = [max(abs(float(left[:, j] @ known[:, i])) for i in range(min(shape))) for j in range(5)]
    assert found.cosines == pytest.approx(expected)
    assert found.indices == tuple(j for j in range(5) if expected[j] < 0.6)
    assert {0, 1} <= set(found.indices)


def test_a_matrix_has_no_intruders_of_its_own() -> None:
    base = random(12, 9)
    assert intruder_dimensions(3 * base, base).indices == ()
    assert len(intruder_dimensions(base, base, top=50).cosines) == 9
    with pytest.raises(InputError, match="of one shape"):
        intruder_dimensions(base, base.T)


def test_peft_finds_as_many() -> None:
    peft = pytest.importorskip("peft")
    intruders = pytest.importorskip("peft.tuners.lora.intruders")
    model = nn.Sequential(nn.Linear(24, 32, bias=False), nn.Linear(32, 20, bias=False))
    for number, layer in enumerate(model):
        layer.weight.data = random(*layer.weight.shape, seed=number).float()  # pyright: ignore[reportAttributeAccessIssue]
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["0", "1"]))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data = 40 * random(*parameter.shape, seed=7).float()
    layers = [module for module in adapted.modules() if isinstance(module, peft.tuners.lora.LoraLayer)]
    ours = []
    for layer in layers:
        base = layer.get_base_layer().weight.data
        ours.append(len(intruder_dimensions(base + layer.get_delta_weight("default"), base).indices))
    said: list[str] = []
    intruders.reduce_intruder_dimension(adapted, logging_sink=said.append)
    counts = [0 if "No intruders" in line else int(line.rpartition(" ")[2]) for line in said if "ntruders" in line]
    assert counts == ours
    assert any(ours)
