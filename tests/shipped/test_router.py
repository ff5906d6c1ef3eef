"""A router that knows fewer experts: it is the stock one whose logits of the others are -inf."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from lowrank_compress.shipped.config import LowRankConfig
from lowrank_compress.shipped.router import PrunedRouter, prune_router, require_all_experts, restore_router
from lowrank_compress.shipped.swap import check_indices, swap_modules
from tests.moe import moe_model

FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2", "gpt_oss")
KEPT = {4: [0, 2, 3], 6: [1, 4, 5]}
PATH = "model.layers.1.mlp.gate"


def router_of(model_type: str) -> Any:
    return moe_model(model_type).get_submodule(PATH.replace("gate", "router") if model_type == "gpt_oss" else PATH)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_it_is_the_stock_router_without_the_others(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stock = router_of(model_type)
    count = len(stock.weight)
    kept = KEPT[count]
    pruned = copy.deepcopy(stock)
    prune_router(pruned, torch.tensor(kept))
    assert isinstance(pruned, type(stock))
    assert list(pruned.weight.shape) == [len(kept), 32]
    x = torch.randn(50, 32, generator=torch.Generator().manual_seed(1))
    linear, gone = nn.functional.linear, [number for number in range(count) if number not in kept]

    def masked(*args: Any) -> torch.Tensor:
        logits = linear(*args)
        logits[:, gone] = float("-inf")
        return logits

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(nn.functional, "linear", masked)
        expected = stock(x)
    with torch.no_grad():
        found = pruned(x)
        before = stock(x)
    assert len(expected) == len(found) == 3
    for one, two in zip(expected, found, strict=True):
        assert one.dtype == two.dtype
        torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-6)
    assert set(found[2].unique().tolist()) == set(kept)
    assert set(before[2].unique().tolist()) == set(range(count))
    restore_router(pruned, dict(stock.named_parameters()))
    assert type(pruned) is type(stock)
    with torch.no_grad():
        assert all(torch.equal(one, two) for one, two in zip(pruned(x), before, strict=True))
    assert not any(name.startswith("lr_") for name in (*pruned.state_dict(), *vars(pruned)))


def test_it_is_copied_and_pickled() -> None:
    router = router_of("mixtral")
    prune_router(router, torch.tensor([1, 3]))
    x = torch.randn(9, 32)
    for made in (copy.deepcopy(router), pickle.loads(pickle.dumps(router))):
        assert all(torch.equal(one, two) for one, two in zip(made(x), router(x), strict=True))
    assert "experts=4, kept=2" in str(router)


def test_what_is_no_such_router_is_refused() -> None:
    with pytest.raises(ValueError, match="a Linear is no router with a row for each expert"):
        prune_router(nn.Linear(3, 4), torch.tensor([0]))
    for kept in ([0], [0, 1, 2, 3, 4]):
        with pytest.raises(ValueError, match=f"{len(kept)} of 4 experts cannot be left where a token goes to 2"):
            prune_router(router_of("mixtral"), torch.tensor(kept))


def test_a_config_puts_it_in_place() -> None:
    config = LowRankConfig(routers={PATH: {"experts": 4, "kept": 3}})
    assert config.version == 6
    assert LowRankConfig(**config.to_dict()).to_dict() == config.to_dict()
    assert "routers" not in LowRankConfig().to_dict()
    model = moe_model("mixtral")
    swap_modules(model, config)
    router = model.get_submodule(PATH)
    assert isinstance(router, PrunedRouter)
    with pytest.raises(ValueError, match="chooses among 3 of 4 experts; the others are gone"):
        require_all_experts(model)
    check_indices(model)
    router.lr_kept[1] = 0
    with pytest.raises(ValueError, match="lr_kept does not name distinct rows of 4"):
        check_indices(model)
    with pytest.raises(ValueError, match="expected a router with a row for each of 5 experts"):
        swap_modules(moe_model("mixtral"), LowRankConfig(routers={PATH: {"experts": 5, "kept": 3}}))


@pytest.mark.parametrize("entry", [{"experts": 4}, {"experts": 4, "kept": 5}, {"experts": 4, "kept": 0}, {"kept": "2"}])
def test_entries_that_say_nothing_are_refused(entry: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected the number of experts, and how many of them are kept, got"):
        LowRankConfig(routers={PATH: entry})
