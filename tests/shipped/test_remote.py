"""Programs that know nothing of this package, given its remote code: by their config, and by `from_config`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from lowrank_compress.shipped.attention import CompressedAttention
from lowrank_compress.shipped.linear import CompressedLinear
from tests.shipped.test_attention import logits, narrowed, one, save
from tests.shipped.test_loading import auto_class, python, write
from tests.tiny import tiny_tokenizer

torch.set_num_threads(1)
pytestmark = pytest.mark.versions

# What lm-eval, `transformers serve` and pipelines do: the config first, with the flag; then by what it says.
PROGRAMS = """
    import json, sys, torch
    sys.modules["lowrank_compress"] = None  # not importable, even where it is installed
    torch.set_num_threads(1)
    import transformers
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, AutoQuantizationConfig
    directory, ids = sys.argv[1], torch.tensor([[5, 9, 2, 30, 41, 7, 3]])

    # Without the flag it is still the native config, and nothing of the checkpoint's runs.
    for trust in (None, False):
        config = transformers.AutoConfig.from_pretrained(directory, trust_remote_code=trust)
        assert type(config) is transformers.LlamaConfig
    assert "lowrank" not in AUTO_QUANTIZER_MAPPING

    config, unused = transformers.AutoConfig.from_pretrained(
        directory, trust_remote_code=True, return_unused_kwargs=True, unheard_of=1, use_cache=False
    )
    assert unused["unheard_of"] == 1 and not config.use_cache
    assert type(config) is transformers.LlamaConfig
    AutoQuantizationConfig.from_dict(config.quantization_config)
    native = transformers.LlamaForCausalLM.from_pretrained(directory)
    with torch.no_grad():
        expected = native(input_ids=ids).logits
        torch.save(expected, directory + "/logits.pt")

    answer = transformers.pipeline("text-generation", directory, trust_remote_code=True)
    greedy = {"max_new_tokens": 4, "do_sample": False}
    (said,) = answer("the quick", **greedy)
    same = transformers.pipeline("text-generation", native, tokenizer=answer.tokenizer)
    assert said == same("the quick", **greedy)[0]

    from lm_eval.models.huggingface import HFLM
    lm = HFLM(pretrained=directory, trust_remote_code=True, device="cpu", batch_size=1)
    with torch.no_grad():
        assert torch.equal(lm.model(input_ids=ids).logits, expected)

    # The copy does the same.
    native.save_pretrained(directory + "-again")
    transformers.AutoConfig.from_pretrained(directory + "-again", trust_remote_code=True)
    again = transformers.LlamaForCausalLM.from_pretrained(directory + "-again")
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, expected)
"""


@pytest.mark.slow
def test_programs_that_ask_for_the_config_first(tmp_path: Path) -> None:
    directory, dense = write(tmp_path / "model", "llama", shard=3)
    tiny_tokenizer(directory)
    (tmp_path / "cache").mkdir()
    python(PROGRAMS, directory, cache=tmp_path / "cache")
    with torch.no_grad():
        expected = dense(input_ids=torch.tensor([[5, 9, 2, 30, 41, 7, 3]])).logits
    torch.testing.assert_close(torch.load(directory / "logits.pt"), expected, rtol=1e-4, atol=1e-4)


def built(auto: Any, directory: Path, **options: Any) -> Any:
    """Build what a checkpoint's config describes, without its weights."""
    config = AutoConfig.from_pretrained(directory, trust_remote_code=True)
    return auto.from_config(config, trust_remote_code=True, **options).eval()


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_neox", "bert"])
def test_from_config_builds_the_compressed_model(model_type: str, tmp_path: Path) -> None:
    """On the meta device all stored tensors fit; else it computes, saves itself and can be loaded and made dense."""
    directory, _ = write(tmp_path / "model", model_type)
    auto, stored = auto_class(model_type), load_file(directory / "model.safetensors")
    with torch.device("meta"):
        empty = built(auto, directory)
    kept = empty.load_state_dict(stored, strict=False, assign=True)
    assert not kept.unexpected_keys
    assert not [name for name in kept.missing_keys if "lr_" in name]
    torch.manual_seed(0)
    model = built(auto, directory)
    assert any(isinstance(module, CompressedLinear) for module in model.modules())
    assert type(model) is type(auto.from_pretrained(directory))
    spread = 4 * model.config.initializer_range
    for module in model.modules():
        if isinstance(module, CompressedLinear):
            assert all(0 < weight.std() < spread for name, weight in module.named_parameters() if "lr_" in name)
            assert module.bias is None or not module.bias.any()
    found = logits(model)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(auto.from_pretrained(tmp_path / "again")), found)
    torch.testing.assert_close(logits(model.dequantize()), found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", ["llama-lm", "gpt2-lm", "qwen2-lm"])
def test_from_config_with_narrower_heads(case: str, tmp_path: Path) -> None:
    small, _ = narrowed(one(case), 0.7, "v")
    directory = save(small, tmp_path / "model")
    torch.manual_seed(0)
    model = built(AutoModelForCausalLM, directory, dtype=torch.float64)
    assert any(isinstance(module, CompressedAttention) for module in model.modules())
    found = logits(model)
    assert found.isfinite().all()
    torch.testing.assert_close(logits(model.dequantize()), found, rtol=1e-8, atol=1e-8)


def test_from_config_of_a_base_model_or_in_another_dtype_or_without_compression(tmp_path: Path) -> None:
    directory, _ = write(tmp_path / "model", "llama")
    base = built(AutoModel, directory, dtype=torch.bfloat16)
    assert type(base.layers[0].mlp.up_proj) is CompressedLinear
    assert {weight.dtype for weight in base.parameters()} == {torch.bfloat16}
    config = AutoConfig.from_pretrained(directory)
    del config.quantization_config
    stock = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    assert not any(isinstance(module, CompressedLinear) for module in stock.modules())
    assert "quantization_config" not in json.loads(stock.config.to_json_string())
