"""Mixtures of experts from a checkpoint to a compressed one: loaded, saved, exported and looked at as others are."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DeepseekV3PreTrainedModel, PreTrainedModel

import lowrank_compress
from lowrank_compress.recipe import Recipe
from lowrank_compress.shipped.experts import SeparateExperts
from lowrank_compress.shipped.fusion import FUSED
from lowrank_compress.shipped.linear import CompressedLinear
from lowrank_compress.stages.plan import make_plan
from tests.moe import MOE, loads_by_its_own_code, save_moe
from tests.ordinary import tokens
from tests.runs import done, refused
from tests.tiny import tiny_text

assert lowrank_compress.__version__
FEW = ("--samples", "8", "--seq-len", "32")
# Every family, every kind of method, every storage.
CASES = [
    ("mixtral", ("--method", "svd-llm")),
    ("qwen2_moe", ("--method", "nystrom", "--metric", "kfac", "--allocate", "loss")),
    ("qwen3_moe", ("--method", "kfac", "--storage", "auto", "--allocate", "loss")),
    ("olmoe", ("--method", "svd", "--storage", "pivot")),
    ("deepseek_v2", ("--method", "afm", "--storage", "pivot")),
    ("deepseek_v3", ("--method", "modegpt")),
    ("gpt_oss", ("--experts", "kfac|nystrom", "--method", "kfac", "--allocate", "loss", "--storage", "auto")),
]

# Tensors of a block that are no claimed matrices.
LEFT_OUT = (
    ".bias",
    "norm.weight",
    ".gate.weight",
    ".router.weight",
    ".sinks",
    "shared_expert_gate.weight",
    "e_score_correction_bias",
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("experts")
    (found / "text.txt").write_text(tiny_text(1500))
    return found


def dense(place: Path, model_type: str) -> Path:
    path = place / model_type
    return path if path.exists() else save_moe(model_type, path)


def compress(place: Path, model_type: str, out: Path, *options: str, ratio: float = 0.5) -> Path:
    model, text = dense(place, model_type), place / "text.txt"
    done("compress", model, "--calibration", text, *FEW, "--ratio", ratio, "--out", out, *options)
    return out


@pytest.fixture(scope="module")
def run(place: Path) -> Path:
    """Factors in attention, experts in factors and narrower ones, some without any unit."""
    return compress(place, "mixtral", place / "auto", ratio=0.7)


def load(path: Path, **options: Any) -> PreTrainedModel:
    auto: Any = AutoModelForCausalLM
    model, info = auto.from_pretrained(path, output_loading_info=True, **options)
    assert not any(info.values()), info
    return model.eval()


@torch.no_grad()
def logits_of(model: PreTrainedModel) -> torch.Tensor:
    return model(torch.stack(tokens(9, 9))).logits


@pytest.mark.parametrize(("model_type", "options"), CASES, ids=[model_type for model_type, _ in CASES])
def test_every_family_and_method(model_type: str, options: tuple[str, ...], place: Path, tmp_path: Path) -> None:
    run = compress(place, model_type, tmp_path / "run", *options)
    model = load(run / "model")
    own = [module for module in model.modules() if isinstance(module, SeparateExperts)]
    assert own
    changed = [module for experts in own for module in experts.modules() if _changed(module)]
    assert len(changed) > len(own)
    report = json.loads((run / "model/lowrank.json").read_text())
    stored = sum(
        tensor.numel()
        for name, tensor in load_file(run / "model/model.safetensors").items()
        if ".layers." in name and not name.endswith(LEFT_OUT)
    )
    assert report["stored_elements"] == stored
    assert report["reached_ratio"] >= 0.5
    done("export", run, "--dense", tmp_path / "dense")
    found = load(tmp_path / "dense")
    assert not any(isinstance(module, SeparateExperts) for module in found.modules())
    torch.testing.assert_close(logits_of(found), logits_of(model), rtol=1e-4, atol=1e-4)
    before, after = (
        set(load_file(path / "model.safetensors")) for path in (dense(place, model_type), tmp_path / "dense")
    )
    assert before == after


def _changed(module: Any) -> bool:
    return isinstance(module, CompressedLinear) or hasattr(module, "lr_stock")


def test_experts_of_one_width_are_a_stock_model(place: Path, tmp_path: Path) -> None:
    options = ("--method", "nystrom", "--attention", "dense", "--allocate", "equal-widths")
    run = compress(place, "mixtral", tmp_path / "run", *options)
    done("export", run, "--native", tmp_path / "native")
    found = load(tmp_path / "native")
    assert found.config.intermediate_size < 40
    assert not any(isinstance(module, SeparateExperts) for module in found.modules())
    torch.testing.assert_close(logits_of(found), logits_of(load(run / "model")), rtol=1e-5, atol=1e-5)
    other = compress(place, "mixtral", tmp_path / "other", "--method", "nystrom")
    assert "is no stock model" in refused("export", other, "--native", tmp_path / "none")


def test_a_router_keeps_its_dtype(tmp_path: Path) -> None:
    """Families that want single precision for it store and load it so, whatever the others are."""
    model = save_moe("deepseek_v3", tmp_path / "half", torch.bfloat16)
    name = "model.layers.1.mlp.gate.weight"
    if "gate.weight" not in (DeepseekV3PreTrainedModel._keep_in_fp32_modules_strict or ()):
        pytest.skip("earlier transformers have it in the dtype of the others")
    state = load_file(model / "model.safetensors")
    state[name] = state[name].float() * 1.001
    save_file(state, model / "model.safetensors", {"format": "pt"})
    done("compress", model, "--method", "svd", "--ratio", "0.3", "--out", tmp_path / "run")
    assert torch.equal(load_file(tmp_path / "run/model/model.safetensors")[name], state[name])
    found = load(tmp_path / "run/model")
    assert found.state_dict()[name].dtype == torch.float32
    assert {p.dtype for name, p in found.named_parameters() if ".experts." in name} == {torch.bfloat16}
    assert logits_of(found).isfinite().all()


@pytest.mark.slow
def test_it_computes_the_same_however_it_is_loaded(run: Path, tmp_path: Path) -> None:
    model = load(run / "model")
    expected = logits_of(model)
    for implementation in ("eager", "batched_mm", "grouped_mm"):
        assert torch.equal(logits_of(load(run / "model", experts_implementation=implementation)), expected)
    model.save_pretrained(tmp_path / "saved")
    saved = load(tmp_path / "saved")
    assert torch.equal(logits_of(saved), expected)
    assert saved.state_dict().keys() == model.state_dict().keys()
    prompt = torch.stack(tokens(7, 7))
    made = [
        model.generate(prompt, max_new_tokens=6, min_new_tokens=6, do_sample=False, use_cache=cache)  # pyright: ignore
        for cache in (True, False)
    ]
    assert torch.equal(*made)
    stock = model.hf_quantizer.dequantize(model)  # pyright: ignore
    torch.testing.assert_close(logits_of(stock), expected, rtol=1e-4, atol=1e-4)
    stock.save_pretrained(tmp_path / "stock")
    torch.testing.assert_close(logits_of(load(tmp_path / "stock")), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_without_the_package_it_loads_by_its_own_code_or_not_at_all(run: Path, tmp_path: Path) -> None:
    loads_by_its_own_code(run / "model", logits_of(load(run / "model")), tmp_path)


def test_what_is_said_of_experts(run: Path) -> None:
    shown = done("show", run, "--json").json
    experts = shown["experts"]
    assert len(experts) == 2 * 4
    for block in range(2):  # two of four experts a token, of eight windows and two of random tokens
        own = [expert for path, expert in experts.items() if f".{block}.mlp" in path]
        assert sum(expert["tokens"] for expert in own) == 2 * (8 + 2) * 32
    for expert in experts.values():
        entries = [shown["matrices"][name] for name in expert["entries"]]
        assert expert["dense"] == 3 * 32 * 40
        assert expert["stored"] == sum(entry["stored"] for entry in entries)
    routers = shown["routers"]
    for block in range(2):
        path = f"model.layers.{block}.mlp.experts"
        shares = [experts[f"{path}.{number}"]["tokens"] / (2 * 10 * 32) for number in range(4)]
        assert routers[path]["experts"] == 4
        assert (routers[path]["busiest"], routers[path]["idlest"]) == (max(shares), min(shares))
        product = math.prod(share**-share for share in shares if share)
        assert routers[path]["in_effect"] == pytest.approx(product)
    said = done("show", run).out
    assert "Routed experts" in said
    assert "choices of the router" in said
    assert {file["state"] for file in done("verify", run, "--json").json["files"]} == {"intact", "dropped"}


def test_experts_that_saw_nothing_are_named(place: Path, tmp_path: Path) -> None:
    model = save_moe("mixtral", tmp_path / "many", num_local_experts=24, num_experts_per_tok=1)
    short = tmp_path / "short.txt"
    short.write_text(tiny_text(60))
    options = ("--method", "kfac", "--allocate", "loss", "--ratio", "0.5", "--samples", "1", "--seq-len", "16")
    said = done("compress", model, "--calibration", short, *options, "--out", tmp_path / "run")
    assert "experts saw no token of the calibration set (model.layers." in said.text
    experts = done("show", tmp_path / "run", "--json").json["experts"]
    blind = [expert for expert in experts.values() if not expert["tokens"]]
    assert blind
    # Not judged by the loss of zero that was measured.
    matrices = json.loads((tmp_path / "run/model/lowrank.json").read_text())["matrices"]
    assert all(
        matrices[name]["predicted_loss"] > 0 or matrices[name]["rank"] is None for e in blind for name in e["entries"]
    )
    assert any(expert["stored"] > expert["dense"] / 10 for expert in blind)
    assert "none" in done("show", tmp_path / "run").out


def test_parts_have_methods_of_their_own(place: Path, tmp_path: Path) -> None:
    options = ("--for", "experts=dense", "--method", "svd")
    run = compress(place, "qwen2_moe", tmp_path / "run", *options, ratio=0.1)
    settings = json.loads((run / "model/config.json").read_text())["quantization_config"]
    assert "experts" not in settings
    assert any("shared_expert" in name for name in settings["modules"])
    load(run / "model")  # experts are stored as stock ones
    only = compress(
        place, "mixtral", tmp_path / "only", "--method", "svd", "--for", "*.1.mlp.experts.2.*=dense", ratio=0.3
    )
    settings = json.loads((only / "model/config.json").read_text())["quantization_config"]
    assert settings["experts"] == {f"model.layers.{block}.mlp.experts": 4 for block in range(2)}
    assert not [name for name in settings["modules"] if ".1.mlp.experts.2." in name]
    assert settings["version"] == 4
    load(only / "model")


def test_heads_that_are_made_of_a_latent_vector_are_refused(place: Path) -> None:
    model = dense(place, "deepseek_v3")
    for options in (("--method", "cr"), ("--attention", "vo-svd"), ("--qk", "svd"), ("--for", "vo=svd")):
        said = refused("compress", model, "--calibration", place / "text.txt", *options)
        assert "'deepseek_v3' are made of a latent vector" in said, said
    plan = make_plan(Recipe(model=str(model), method="modegpt", calibration=str(place / "text.txt"), seq_len=32))
    assert "modegpt compresses the attention by svd-llm here" in " ".join(plan.notes)


def test_a_stock_checkpoint_whose_experts_lie_in_one_tensor(place: Path, tmp_path: Path) -> None:
    path = tmp_path / "fused"
    shutil.copytree(dense(place, "mixtral"), path)
    state = AutoModelForCausalLM.from_pretrained(path).state_dict()
    save_file(
        {name: tensor.contiguous() for name, tensor in state.items()}, path / "model.safetensors", {"format": "pt"}
    )
    runs = [tmp_path / "run", tmp_path / "parted"]
    for model, run in zip((path, dense(place, "mixtral")), runs, strict=True):
        done("compress", model, "--method", "svd", "--for", "*.0.mlp.experts.*=dense", "--ratio", 0.2, "--out", run)
    found, expected = (logits_of(load(run / "model")) for run in runs)
    assert torch.equal(found, expected)
    one, other = (_experts_in(run / "model") for run in runs)
    assert one - other == {f"model.layers.0.mlp.experts.{leaf}" for leaf in FUSED}
    done("export", runs[0], "--dense", tmp_path / "dense")
    assert _experts_in(tmp_path / "dense") == _experts_in(place / "mixtral")
    torch.testing.assert_close(logits_of(load(tmp_path / "dense")), expected, rtol=1e-4, atol=1e-4)


def _experts_in(path: Path) -> set[str]:
    return {name for name in load_file(path / "model.safetensors") if ".experts." in name}


def test_every_family_is_tried() -> None:
    assert [model_type for model_type, _ in CASES] == [*MOE]


@pytest.mark.parametrize("targets", ["all-linear", ["lr_gating", "lr_up", "lr_down"]])
def test_adapters_on_experts_train_and_are_merged(targets: Any, run: Path) -> None:
    """Some of them are factors and others are not, so that all linear layers have names of both kinds."""
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(load(run / "model"), peft.LoraConfig(r=2, target_modules=targets))
    ids = torch.stack(tokens(9, 9))
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):
        adapted(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    own = {name.split(".lora_")[0] for name, p in adapted.named_parameters() if p.requires_grad}
    assert any(".experts." in name for name in own)
    assert any(name.endswith("lr_in") for name in own) == (targets == "all-linear")
    expected = logits_of(adapted)
    assert not torch.allclose(expected, logits_of(load(run / "model")), atol=1e-3)
    torch.testing.assert_close(logits_of(adapted.merge_and_unload()), expected, rtol=1e-4, atol=1e-4)


def test_what_peft_does_not_find_it_names(run: Path) -> None:
    peft = pytest.importorskip("peft")
    with pytest.raises(ValueError, match="target_parameters"):
        peft.get_peft_model(load(run / "model"), peft.LoraConfig(target_parameters=["mlp.experts.gate_up_proj"]))
