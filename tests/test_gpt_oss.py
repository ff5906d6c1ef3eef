"""GPT-OSS: experts that lie transposed, with biases and gate and up by turns; a gate function and sinks of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import lowrank_compress
from lowrank_compress.arch.resolve import separate_experts
from lowrank_compress.shipped.experts import SeparateExperts, join_experts
from lowrank_compress.shipped.fusion import fusion_of
from tests.moe import MOE, loads_by_its_own_code, moe_model, plain_expert, plain_hidden
from tests.ordinary import tokens
from tests.runs import done
from tests.test_expert_methods import check_counts, settings_of
from tests.test_experts import compress, dense, load, logits_of
from tests.test_experts import place as place

assert lowrank_compress.__version__
LEAVES = {"gate": "lr_gating", "up": "lr_up", "down": "lr_down"}


@pytest.fixture(scope="module")
def run(place: Path) -> Path:
    """Narrower experts of widths of their own, and factors; attention in factors."""
    options = ("--method", "kfac", "--storage", "auto", "--allocate", "loss", "--for", "*.0.mlp.experts.*=nystrom")
    return compress(place, "gpt_oss", place / "gpt-oss-run", *options, ratio=0.6)


@pytest.mark.parametrize("model_type", MOE)
def test_experts_are_parted_and_joined_again(model_type: str) -> None:
    model = moe_model(model_type, torch.float64)
    model.set_experts_implementation("eager")
    path = "model.layers.1.mlp.experts"
    stock = model.get_submodule(path)
    plain = [plain_expert(stock, number) for number in range(len(stock.down_proj))]  # pyright: ignore
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = logits_of(model)
    separate_experts(model)
    experts = model.get_submodule(path)
    assert isinstance(experts, SeparateExperts)
    x = torch.randn(7, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for number, parts in enumerate(plain):
        own: Any = experts[number]
        for role, (weight, bias) in parts.items():
            linear = own.get_submodule(LEAVES[role])
            assert torch.equal(linear.weight, weight)
            assert (linear.bias is None) == (bias is None)
            assert bias is None or torch.equal(linear.bias, bias)
        gate, up = (nn.functional.linear(x, *parts[role]) for role in ("gate", "up"))
        torch.testing.assert_close(own.hidden(x), plain_hidden(stock, gate, up), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(logits_of(model), expected, rtol=1e-10, atol=1e-12)
    join_experts(model)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_what_is_no_such_module_is_none() -> None:
    experts: Any = moe_model("gpt_oss").get_submodule("model.layers.0.mlp.experts")
    assert fusion_of(experts) == (True, True, True)
    experts.has_gate = False
    assert fusion_of(experts) is None
    assert fusion_of(nn.Linear(2, 2)) is None


def plain_model(run: Path, place: Path) -> Any:
    """The stock model, with the dense weights that the compressed one's matrices stand for, where widths are full."""
    model, own = load(place / "gpt_oss").double(), load(run / "model").double()
    for path, experts in own.named_modules():
        if not isinstance(experts, SeparateExperts):
            continue

        def forward(x: Tensor, index: Tensor, weights: Tensor, experts: Any = experts, path: str = path) -> Tensor:
            stock, out = model.get_submodule(path), torch.zeros_like(x)
            for token in range(len(x)):
                for number, weight in zip(index[token].tolist(), weights[token], strict=True):
                    parts = {role: experts[number].get_submodule(leaf) for role, leaf in LEAVES.items()}
                    product = {role: getattr(part, "dense_weight", lambda: None)() for role, part in parts.items()}
                    matrix = {role: parts[role].weight if product[role] is None else product[role] for role in parts}
                    gate, up = (matrix[role] @ x[token] + parts[role].bias for role in ("gate", "up"))
                    hidden = plain_hidden(stock, gate, up)
                    out[token] += weight * (matrix["down"] @ hidden + parts["down"].bias)
            return out

        model.get_submodule(path).forward = forward
    for path, layer in own.named_modules():
        if ".self_attn." in path and hasattr(layer, "dense_weight"):
            model.get_submodule(path).weight.data = layer.dense_weight()  # pyright: ignore
    return model


def test_it_computes_what_the_stock_model_does_with_the_same_products(run: Path, place: Path) -> None:
    settings = settings_of(run)
    assert any(".experts." in name for name in settings["modules"])
    assert any(".experts." in name for name in settings["dense_shapes"])
    found = logits_of(load(run / "model").double())
    torch.testing.assert_close(found, logits_of(plain_model(run, place)), rtol=1e-6, atol=1e-9)


@pytest.mark.slow
def test_it_is_loaded_saved_and_generates(run: Path, tmp_path: Path) -> None:
    model = load(run / "model")
    expected = logits_of(model)
    for implementation in ("batched_mm", "grouped_mm"):
        assert torch.equal(logits_of(load(run / "model", experts_implementation=implementation)), expected)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits_of(load(tmp_path / "saved")), expected)
    prompt = torch.stack(tokens(11, 11))  # longer than the window
    made = [
        model.generate(prompt, max_new_tokens=6, min_new_tokens=6, do_sample=False, **options)  # pyright: ignore
        for options in ({"use_cache": False}, {"use_cache": True}, {"cache_implementation": "static"})
    ]
    assert all(torch.equal(made[0], other) for other in made[1:])
    loads_by_its_own_code(run / "model", expected, tmp_path)


def test_it_is_shown_measured_refined_and_exported(run: Path, place: Path, tmp_path: Path) -> None:
    shown = done("show", run, "--json").json
    assert len(shown["experts"]) == 2 * 4
    assert {file["state"] for file in done("verify", run, "--json").json["files"]} == {"intact", "dropped"}
    text = place / "text.txt"
    found = done("eval", run, "--perplexity", text, "--seq-len", 32, "--limit", 2, "--force", "--json").json
    assert found["perplexity"][str(text)]["tokens"] > 0
    done("refine", run, "--samples", "8")
    expected = logits_of(load(run / "refine"))
    done("export", run, "--dense", tmp_path / "dense")
    exported = load(tmp_path / "dense")
    assert not any(isinstance(module, SeparateExperts) for module in exported.modules())
    torch.testing.assert_close(logits_of(exported), expected, rtol=1e-4, atol=1e-4)
    before, after = (load_file(path / "model.safetensors") for path in (dense(place, "gpt_oss"), tmp_path / "dense"))
    assert {name: tensor.shape for name, tensor in before.items()} == {n: t.shape for n, t in after.items()}
    stock = (model := load(run / "refine")).hf_quantizer.dequantize(model)  # pyright: ignore
    torch.testing.assert_close(logits_of(stock), expected, rtol=1e-4, atol=1e-4)


def test_experts_of_one_width_are_a_stock_model(place: Path, tmp_path: Path) -> None:
    options = ("--method", "nystrom", "--attention", "dense", "--allocate", "equal-widths")
    run = compress(place, "gpt_oss", tmp_path / "run", *options)
    done("export", run, "--native", tmp_path / "native")
    found = load(tmp_path / "native")
    assert found.config.intermediate_size < 24
    assert not any(isinstance(module, SeparateExperts) for module in found.modules())
    torch.testing.assert_close(logits_of(found), logits_of(load(run / "model")), rtol=1e-5, atol=1e-5)


def test_experts_of_a_block_that_stay_are_stored_as_they_were(place: Path, tmp_path: Path) -> None:
    options = ("--method", "svd", "--for", "*.0.mlp.experts.*=dense")
    run = compress(place, "gpt_oss", tmp_path / "run", *options, ratio=0.2)
    path = "model.layers.0.mlp.experts"
    before, after = load_file(dense(place, "gpt_oss") / "model.safetensors"), load_file(run / "model/model.safetensors")
    own = {name for name in after if name.startswith(path)}
    assert own == {name for name in before if name.startswith(path)}
    assert all(torch.equal(before[name], after[name]) for name in own)
    refined = compress(place, "gpt_oss", tmp_path / "refined", *options, "--refine", ratio=0.2)
    assert json.loads((refined / "model/lowrank.json").read_text())["refine"]
    assert own == {name for name in load_file(refined / "model/model.safetensors") if name.startswith(path)}
    assert logits_of(load(refined / "model")).isfinite().all()
    assert not any(name.startswith(path) for name in settings_of(run)["modules"])
    expected = logits_of(load(run / "model"))
    done("export", run, "--dense", tmp_path / "dense")
    torch.testing.assert_close(logits_of(load(tmp_path / "dense")), expected, rtol=1e-4, atol=1e-4)


def test_removed_experts_are_those_that_the_router_forgets(place: Path, tmp_path: Path) -> None:
    run = compress(place, "gpt_oss", tmp_path / "run", "--method", "reap", ratio=0.14)
    check_counts(run, 0.14)
    shapes = settings_of(run)["dense_shapes"]
    gone = {b: [n for n in range(4) if f"model.layers.{b}.mlp.experts.{n}.lr_up" in shapes] for b in range(2)}
    assert all(len(numbers) == 1 for numbers in gone.values())
    stock = load(place / "gpt_oss")
    for block, numbers in gone.items():
        router: Any = stock.get_submodule(f"model.layers.{block}.mlp.router")
        router.bias.data[numbers] = float("-inf")
    model = load(run / "model")
    torch.testing.assert_close(logits_of(model), logits_of(stock), rtol=1e-5, atol=1e-6)
    logits = model(torch.stack(tokens(9, 9)), output_router_logits=True).router_logits
    assert [each.isinf().nonzero()[:, 1].unique().tolist() for each in logits] == [*gone.values()]
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits_of(load(tmp_path / "saved")), logits_of(model))


@pytest.mark.parametrize("options", [(), ("--option", "align=true", "--option", "subspace=0.9")])
def test_merged_experts_have_the_mean_of_their_biases(options: tuple[str, ...], place: Path, tmp_path: Path) -> None:
    run = compress(place, "gpt_oss", tmp_path / "run", "--method", "merge", *options, ratio=0.3)
    check_counts(run, 0.3)
    shown = done("show", run, "--json").json["experts"]
    model, stock = load(run / "model"), load(place / "gpt_oss")
    for block in range(2):
        path = f"model.layers.{block}.mlp.experts"
        experts, own = model.get_submodule(path), stock.get_submodule(path)
        leads = model.get_buffer(f"{path}.lr_leads").tolist()
        for lead in set(leads):
            members = [number for number in range(4) if leads[number] == lead]
            seen = torch.tensor([float(shown[f"{path}.{member}"]["tokens"]) for member in members])
            mean = (seen / seen.sum()) @ own.down_proj_bias[members]  # pyright: ignore
            bias = experts.get_parameter(f"{lead}.lr_down.bias")
            torch.testing.assert_close(bias, mean, rtol=1e-4, atol=1e-6)
            if not options:
                both = (seen / seen.sum()) @ own.gate_up_proj_bias[members]  # pyright: ignore
                torch.testing.assert_close(
                    experts.get_parameter(f"{lead}.lr_up.bias"), both[1::2], rtol=1e-4, atol=1e-6
                )
    done("export", run, "--dense", tmp_path / "dense")
    torch.testing.assert_close(logits_of(load(tmp_path / "dense")), logits_of(model), rtol=1e-5, atol=1e-5)


def test_units_of_camera_take_their_biases_along(place: Path, tmp_path: Path) -> None:
    run = compress(place, "gpt_oss", tmp_path / "run", "--method", "camera", ratio=0.4)
    check_counts(run, 0.4)
    model, stock = load(run / "model"), load(place / "gpt_oss")
    widths = set()
    for block in range(2):
        own: Any = stock.get_submodule(f"model.layers.{block}.mlp.experts")
        for number in range(4):
            expert: Any = model.get_submodule(f"model.layers.{block}.mlp.experts.{number}")
            parts = plain_expert(own, number)
            kept = [(parts["up"][0] == row).all(1).nonzero().item() for row in expert.lr_up.weight]
            assert torch.equal(expert.lr_up.bias, parts["up"][1][kept])  # pyright: ignore
            assert torch.equal(expert.lr_gating.bias, parts["gate"][1][kept])  # pyright: ignore
            assert torch.equal(expert.lr_down.bias, parts["down"][1])  # pyright: ignore
            widths.add(len(kept))
    assert len(widths) > 1
    done("export", run, "--dense", tmp_path / "dense")
    torch.testing.assert_close(logits_of(load(tmp_path / "dense")), logits_of(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["cr", "vo-svd", "modegpt"])
def test_heads_become_narrower_beside_sinks_and_windows(method: str, place: Path, tmp_path: Path) -> None:
    run = compress(place, "gpt_oss", tmp_path / "run", "--method", method, ratio=0.05)
    settings = settings_of(run)
    assert len(settings["attention"]) == 2
    assert all(entry["traits"]["sinks"] == "sinks" for entry in settings["attention"].values())
    model = load(run / "model")
    expected = logits_of(model)
    if method != "modegpt":
        done("export", run, "--dense", tmp_path / "dense")
        torch.testing.assert_close(logits_of(load(tmp_path / "dense")), expected, rtol=1e-4, atol=1e-5)
    prompt = torch.stack(tokens(11, 11))
    made = [
        model.generate(prompt, max_new_tokens=6, min_new_tokens=6, do_sample=False, use_cache=cache)  # pyright: ignore
        for cache in (True, False)
    ]
    assert torch.equal(*made)
