"""`--experts merge` from a checkpoint to one of which some experts stand for others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lowrank_compress
from lowrank_compress.shipped.config import LowRankConfig
from lowrank_compress.shipped.experts import SeparateExperts
from tests.ordinary import tokens
from tests.runs import done, refused
from tests.test_expert_methods import check_counts, settings_of
from tests.test_experts import compress, load, logits_of
from tests.test_experts import place as place

assert lowrank_compress.__version__
EACH = 3 * 32 * 40  # elements of an expert


@pytest.fixture(scope="module")
def merged(place: Path) -> Path:
    return compress(place, "mixtral", place / "merge", "--method", "merge", ratio=0.3)


def test_it_is_the_stock_model_with_the_same_weights_for_several(merged: Path, place: Path, tmp_path: Path) -> None:
    report = check_counts(merged, 0.3)
    assert {name: (entry["rank"], entry["stored"]) for name, entry in report["matrices"].items()} == {
        f"model.layers.{block}:experts": (2, 2 * EACH + 4) for block in range(2)
    }
    settings = settings_of(merged)
    assert settings["merged"] == {f"model.layers.{block}.mlp.experts": 2 for block in range(2)}
    assert settings["version"] == 9
    model = load(merged / "model")
    expected = logits_of(model)
    stock = load(place / "mixtral")
    for block in range(2):
        path = f"model.layers.{block}.mlp.experts"
        leads = model.get_buffer(f"{path}.lr_leads").tolist()
        assert len(set(leads)) == 2
        own, experts = model.get_submodule(path), stock.get_submodule(path)
        for number, lead in enumerate(leads):
            one = own[lead]  # pyright: ignore
            experts.gate_up_proj.data[number] = torch.cat([one.lr_gating.weight, one.lr_up.weight])  # pyright: ignore
            experts.down_proj.data[number] = one.lr_down.weight  # pyright: ignore
    torch.testing.assert_close(logits_of(stock), expected, rtol=1e-5, atol=1e-6)
    for implementation in ("batched_mm", "grouped_mm"):
        assert torch.equal(logits_of(load(merged / "model", experts_implementation=implementation)), expected)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits_of(load(tmp_path / "saved")), expected)
    prompt = torch.stack(tokens(7, 7))
    made = [
        model.generate(prompt, max_new_tokens=6, min_new_tokens=6, do_sample=False, use_cache=cache)  # pyright: ignore
        for cache in (True, False)
    ]
    assert torch.equal(*made)
    # What is exported is a stock model.
    done("export", merged, "--dense", tmp_path / "dense")
    dense = load(tmp_path / "dense")
    assert not any(isinstance(module, SeparateExperts) for module in dense.modules())
    torch.testing.assert_close(logits_of(dense), expected, rtol=1e-5, atol=1e-6)
    turned = model.hf_quantizer.dequantize(model)  # pyright: ignore
    torch.testing.assert_close(logits_of(turned), expected, rtol=1e-5, atol=1e-6)
    said = refused("export", merged, "--native", tmp_path / "native")
    assert "has experts that stand for others" in said
    assert "Compress with --experts reap --allocate uniform for fewer experts" in said


def test_what_is_said_of_them(merged: Path) -> None:
    experts = done("show", merged, "--json").json["experts"]
    for block in range(2):
        own = {path: each for path, each in experts.items() if f".{block}.mlp" in path}
        led = {path: each["leads_to"] for path, each in own.items() if "leads_to" in each}
        assert len(led) == 2
        for path, each in own.items():
            assert each["stored"] == (0 if path in led else EACH)
        for path, lead in led.items():
            assert lead not in led
            assert own[lead]["tokens"] >= own[path]["tokens"]
    assert "in " in done("show", merged).out
    assert {file["state"] for file in done("verify", merged, "--json").json["files"]} == {"intact", "dropped"}


def test_experts_that_lead_to_others_that_are_led_are_refused(merged: Path, tmp_path: Path) -> None:
    model = load(merged / "model")
    model.save_pretrained(tmp_path / "saved")
    state = load_file(tmp_path / "saved/model.safetensors")
    name = min(name for name in state if name.endswith("experts.lr_leads"))
    for damaged in ([1, 2, 3, 0], [0, 1, 2, 3], [0, 0, 0, 9]):
        state[name] = torch.tensor(damaged, dtype=torch.int32)
        save_file(state, tmp_path / "saved/model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match=r"lr_leads does not name 2 experts, each its own: it is damaged"):
            load(tmp_path / "saved")
        assert "does not name 2 experts" in refused("export", tmp_path / "saved", "--dense", tmp_path / "dense")
    with pytest.raises(ValueError, match="expected how many of its 4 separate experts are left, got 4"):
        LowRankConfig(experts={"e": 4}, merged={"e": 4})


def test_beside_other_methods_refined_and_aligned(place: Path, tmp_path: Path) -> None:
    options = ("--experts", "merge", "--option", "align=true", "--option", "subspace=0.9", "--refine")
    run = compress(place, "deepseek_v3", tmp_path / "run", *options, ratio=0.4)
    report = check_counts(run, 0.4)
    assert any(name.endswith(":experts") for name in report["matrices"])
    before = load_file(run / "unrefined/model.safetensors") if (run / "unrefined").exists() else None
    found = json.loads((run / "model/lowrank.json").read_text())
    assert "refine" in found
    if before is not None:
        after = load_file(run / "model/model.safetensors")
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert not {name for name in changed if "experts." in name and "shared" not in name and "lr_down" not in name}
    assert logits_of(load(run / "model")).isfinite().all()
