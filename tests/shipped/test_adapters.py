"""LoRA on compressed layers by the names that they have in the stock model."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lowrank_compress.shipped.linear import CompressedLinear
from tests.shipped.test_loading import IDS, logits, python, write

peft = pytest.importorskip("peft")
torch.set_num_threads(1)
pytestmark = pytest.mark.versions

# By their names, or by what peft takes for a family where none are given.
TARGETS = {"llama": None, "gpt2": ["c_attn", "c_fc", "c_proj"], "gpt_neox": ["query_key_value", "dense_h_to_4h"]}


def trained(directory: Path, **options: Any) -> tuple[Any, list[float]]:
    torch.manual_seed(0)
    config = peft.LoraConfig(**{"r": 2, "lora_alpha": 6, "task_type": "CAUSAL_LM"} | options)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(directory), config)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(4):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    pickle.dumps(config)
    return model.eval(), losses


@pytest.mark.filterwarnings("error:Unsupported layer type")
@pytest.mark.parametrize("model_type", TARGETS)
def test_trains_merges_and_comes_back(model_type: str, tmp_path: Path) -> None:
    directory, _ = write(tmp_path / "model", model_type)
    model, losses = trained(directory, target_modules=TARGETS[model_type])
    assert losses[-1] < losses[0]
    found, ranks = logits(model), [layer.entries for layer in model.modules() if isinstance(layer, CompressedLinear)]
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(directory), tmp_path / "adapter")
    assert torch.equal(logits(again), found)

    # Merged and taken apart again, it is what it was.
    with again.disable_adapter():
        base = logits(again)
    again.merge_adapter()
    torch.testing.assert_close(logits(again), found, rtol=1e-4, atol=1e-4)
    again.unmerge_adapter()
    torch.testing.assert_close(logits(again), found, rtol=1e-5, atol=1e-5)
    with again.disable_adapter():
        torch.testing.assert_close(logits(again), base, rtol=1e-5, atol=1e-5)

    merged = again.merge_and_unload()
    torch.testing.assert_close(logits(merged), found, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(merged), base, rtol=1e-2, atol=1e-2)
    layers = [layer for layer in merged.modules() if isinstance(layer, CompressedLinear)]
    assert [layer.entries for layer in layers] != ranks
    assert {part.format for layer in layers for part in layer.parts} >= {"pivot", "pair"}
    merged.save_pretrained(tmp_path / "merged")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(logits(loaded), logits(merged))
    torch.testing.assert_close(logits(loaded.dequantize()), found, rtol=1e-4, atol=1e-4)


def test_two_adapters_merge_one_after_the_other(tmp_path: Path) -> None:
    directory, _ = write(tmp_path / "model", "llama")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(directory), config).eval()
    model.add_adapter("other", config)
    model.base_model.set_adapter(["default", "other"])
    both = logits(model)
    model.merge_adapter(["default"])
    model.merge_adapter(["other"])
    torch.testing.assert_close(logits(model), both, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), both, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{"use_dora": True}, {"init_lora_weights": "pissa"}], ids=str)
def test_what_looks_at_the_weight_is_refused(options: dict[str, Any], tmp_path: Path) -> None:
    directory, _ = write(tmp_path / "model", "llama")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], **options)
    with pytest.raises(ValueError, match=r'pass target_modules="all-linear", or \["lr_in", "lr_out"\]'):
        peft.get_peft_model(AutoModelForCausalLM.from_pretrained(directory), config)


def test_what_cannot_be_merged_is_refused(tmp_path: Path) -> None:
    directory, _ = write(tmp_path / "model", "llama")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, lora_bias=True)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(directory), config)
    with pytest.raises(RuntimeError, match="cannot be merged into a layer without a bias"):
        model.merge_adapter()
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(directory), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="adapter default has NaN or infinite elements"):
        model.merge_adapter(safe_merge=True)


ALONE = """
    import sys, torch
    sys.modules["lowrank_compress"] = None  # not importable, even where it is installed
    torch.set_num_threads(1)
    directory, other, ids = *sys.argv[1:], torch.tensor([[5, 9, 2, 30, 41, 7, 3]])
    import transformers
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
    assert "peft" not in sys.modules
    import peft
    for model in (model, transformers.AutoModelForCausalLM.from_pretrained(other, trust_remote_code=True)):
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
        adapted = peft.get_peft_model(model, config).eval()
        with torch.no_grad():
            found = adapted(input_ids=ids).logits
            merged = adapted.merge_and_unload()
            torch.testing.assert_close(merged(input_ids=ids).logits, found, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(directory + "-merged")
    again = transformers.AutoModelForCausalLM.from_pretrained(directory + "-merged", trust_remote_code=True)
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=ids).logits, found, rtol=1e-4, atol=1e-4)
"""


@pytest.mark.slow
def test_with_remote_code_alone(tmp_path: Path) -> None:
    """Loaded before peft is imported and after, with the code of each checkpoint."""
    places = [write(tmp_path / name, "llama")[0] for name in ("one", "two")]
    (tmp_path / "cache").mkdir()
    python(ALONE, *places, cache=tmp_path / "cache")


def test_keys_that_the_cache_rebuilds_take_no_adapter() -> None:
    layer = CompressedLinear(8, 8, False, [{"rows": 8, "format": "latent"}])
    model = torch.nn.ModuleDict({"k_proj": layer})
    with pytest.raises(ValueError, match=r"k_proj takes no adapter: its keys or values are rebuilt"):
        peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["k_proj"]), model)
