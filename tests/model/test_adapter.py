"""An adapter is merged into its base as peft itself merges it, once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from lowrank_compress.errors import CheckpointError, InputError, LrcError, UnsupportedError
from lowrank_compress.model.blueprint import blueprint
from lowrank_compress.model.checkpoint import Checkpoint
from lowrank_compress.model.locate import locate
from tests.ordinary import tokens
from tests.runs import Tiny, done, refused
from tests.tiny import save_tiny, tiny_tokenizer


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def trained(base: Path, place: Path, model: PreTrainedModel | None = None, **options: Any) -> Path:
    """Write an adapter whose every element is random, as if it had been trained."""
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 8, "init_lora_weights": False, **options}
    model = model or AutoModelForCausalLM.from_pretrained(base)
    whole = get_peft_model(model, LoraConfig(**settings))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in whole.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    whole.peft_config["default"].base_model_name_or_path = str(base)
    whole.save_pretrained(place)
    return place


def read_all(path: Path) -> dict[str, Tensor]:
    plan = blueprint(Checkpoint(path))
    return {name: plan.read(name) for name in plan.stored}


def assert_merged(adapter: Path, expected: PreTrainedModel) -> Path:
    """Our merged checkpoint equals peft's merged model, bit for bit."""
    found = locate(str(adapter))
    assert found != adapter
    state = read_all(found)
    tied = expected.all_tied_weights_keys
    wanted = {name: tensor for name, tensor in expected.state_dict().items() if name not in tied}
    assert set(state) == set(wanted)
    for name, tensor in wanted.items():
        assert torch.equal(state[name], tensor), name
    return found


F32 = torch.float32
CASES: dict[str, tuple[str, dict[str, Any], torch.dtype]] = {
    "llama": ("llama", {}, F32),
    "llama in bfloat16": ("llama", {}, torch.bfloat16),
    "all linear layers": ("llama", {"target_modules": "all-linear"}, F32),
    "dora": ("llama", {"use_dora": True, "target_modules": ["q_proj", "down_proj"]}, F32),
    "a head and norms of its own": ("llama", {"modules_to_save": ["lm_head", "norm"]}, F32),
    "biases": ("qwen2", {"bias": "lora_only", "target_modules": ["q_proj", "v_proj"]}, F32),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}, F32),
    "a trained embedding": (
        "llama",
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        torch.float32,
    ),
    "tokens": ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [5, 9]}, F32),
}


@pytest.mark.parametrize("case", CASES)
def test_what_peft_merges(case: str, tmp_path: Path) -> None:
    model_type, options, dtype = CASES[case]
    base = save_tiny(model_type, tmp_path / "base", dtype=dtype)
    adapter = trained(base, tmp_path / "adapter", **options)
    own = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).merge_and_unload()
    found = assert_merged(adapter, own)
    before = read_all(base)
    assert any(not torch.equal(tensor, before[name]) for name, tensor in read_all(found).items())
    assert AutoTokenizer.from_pretrained(found).vocab_size == AutoTokenizer.from_pretrained(base).vocab_size
    # And what transformers loads from the adapter's directory computes the same, where it can load all of it.
    ids = torch.stack(tokens(7, 7))
    beside, info = AutoModelForCausalLM.from_pretrained(adapter, output_loading_info=True)
    assert bool(info["missing_keys"]) == (case == "dora")  # whose magnitudes it draws at random
    if not info["missing_keys"]:
        merged = AutoModelForCausalLM.from_pretrained(found)
        with torch.no_grad():
            ours, theirs = (model.double()(input_ids=ids).logits for model in (merged, beside))
        assert (ours - theirs).abs().max() < (0.05 if dtype == torch.bfloat16 else 1e-5) * theirs.abs().max()


def test_new_tokens(tmp_path: Path) -> None:
    """An adapter that was trained after tokens were added brings the embedding and the tokenizer that have them."""
    base = save_tiny("llama", tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(99)
    adapter = trained(base, tmp_path / "adapter", model, modules_to_save=["embed_tokens", "lm_head"])
    tokenizer = tiny_tokenizer(adapter)
    tokenizer.add_tokens(["[a]", "[b]", "[c]"])
    tokenizer.save_pretrained(adapter)
    again = AutoModelForCausalLM.from_pretrained(base)
    again.resize_token_embeddings(99)
    found = assert_merged(adapter, PeftModel.from_pretrained(again, adapter).merge_and_unload())
    assert Checkpoint(found).config.vocab_size == 99
    assert len(AutoTokenizer.from_pretrained(found)) == 99


def test_a_classifier_on_a_language_model(tmp_path: Path) -> None:
    """The base has no head for it, the adapter brings one."""
    base = save_tiny("llama", tmp_path / "base")

    def classifier() -> PreTrainedModel:
        return AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)

    adapter = trained(base, tmp_path / "adapter", classifier(), task_type="SEQ_CLS")
    found = assert_merged(adapter, PeftModel.from_pretrained(classifier(), adapter).merge_and_unload())
    assert blueprint(Checkpoint(found)).task == "classification"


def test_full_weights_beside_an_adapter(tmp_path: Path) -> None:
    """transformers loads both; the bare base would be another model."""
    base = save_tiny("llama", tmp_path / "base")
    adapter = trained(base, tmp_path / "adapter")
    for path in adapter.iterdir():
        if path.name.startswith("adapter_"):
            shutil.copy(path, base)
    settings = json.loads((base / "adapter_config.json").read_text()) | {"base_model_name_or_path": "no/where"}
    (base / "adapter_config.json").write_text(json.dumps(settings))
    found = locate(str(base))
    with pytest.raises(CheckpointError, match="has weights and an adapter beside them"):
        Checkpoint(base)
    ids = torch.stack(tokens(7, 7))
    with torch.no_grad():
        both = AutoModelForCausalLM.from_pretrained(base)(input_ids=ids).logits
        merged = AutoModelForCausalLM.from_pretrained(found)(input_ids=ids).logits
    assert (merged - both).abs().max() < 1e-4 * both.abs().max()
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(read_all(found)[name], load_file(base / "model.safetensors")[name])


def test_it_is_made_once_and_anew_where_anything_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = save_tiny("llama", tmp_path / "base")
    adapter = trained(base, tmp_path / "adapter")
    found = locate(str(adapter))
    with monkeypatch.context() as patch:
        patch.setattr("lowrank_compress.model.adapter._merge", lambda *_: pytest.fail("merged again"))
        assert locate(str(adapter)) == found
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, adapter / "adapter_model.safetensors")
    other = locate(str(adapter))
    assert other != found
    state = load_file(base / "model.safetensors")
    save_file({name: tensor * 2 for name, tensor in state.items()}, base / "model.safetensors", {"format": "pt"})
    assert locate(str(adapter)) not in (found, other)


def test_nothing_is_left_of_a_merge_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = save_tiny("llama", tmp_path / "base")
    adapter = trained(base, tmp_path / "adapter")

    def fail(*_: object) -> None:
        raise CheckpointError("stop")

    monkeypatch.setattr("lowrank_compress.model.adapter._merge", fail)
    with pytest.raises(CheckpointError, match="stop"):
        locate(str(adapter))
    assert list((tmp_path / "cache/lowrank_compress/merged").iterdir()) == []


def test_a_run_remembers_the_adapter(tiny: Tiny, tmp_path: Path) -> None:
    adapter = trained(tiny.model, tmp_path / "adapter")
    run = tmp_path / "run"
    done("compress", adapter, *tiny.options(run, "svd")[1:])
    assert json.loads((run / "run.json").read_text())["base"] == str(adapter.resolve())
    found = done("eval", run, "--perplexity", tiny.heldout, "--json").json
    bare = done("eval", tiny.model, "--perplexity", tiny.heldout, "--json").json
    (ours,), (other,) = found["perplexity"].values(), bare["perplexity"].values()
    assert ours["dense"] != other["dense"]


# --- What cannot be merged


def edit(adapter: Path, **fields: object) -> None:
    settings = json.loads((adapter / "adapter_config.json").read_text()) | fields
    (adapter / "adapter_config.json").write_text(json.dumps(settings))


def retrain(change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Callable[[Path], None]:
    def rewrite(adapter: Path) -> None:
        path = adapter / "adapter_model.safetensors"
        save_file(change(load_file(path)), path)

    return rewrite


def drop(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if "layers.1.self_attn.q_proj" not in name}


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no base": (lambda a: edit(a, base_model_name_or_path=None), "names no base"),
    "no such base": (lambda a: edit(a, base_model_name_or_path="a/b"), "The base 'a/b' of .* cannot be had"),
    "itself": (lambda a: edit(a, base_model_name_or_path=str(a)), "names itself as its base"),
    "no kind": (lambda a: edit(a, peft_type=None), "has no peft_type"),
    "an unknown kind": (lambda a: edit(a, peft_type="TOMORROW"), "peft cannot merge the adapter"),
    "megatron": (lambda a: edit(a, megatron_config={"a": 1}, megatron_core="this"), "for Megatron"),
    "no json": (lambda a: (a / "adapter_config.json").write_text("{"), "cannot be read as JSON"),
    "a list": (lambda a: (a / "adapter_config.json").write_text("[]"), "holds a JSON list"),
    "no weights": (lambda a: (a / "adapter_model.safetensors").unlink(), "has no adapter_model.safetensors"),
    "cut": (lambda a: (a / "adapter_model.safetensors").write_bytes(b"1"), "is not a whole safetensors file"),
    "other modules": (lambda a: edit(a, target_modules=["c_attn"]), "peft cannot merge the adapter"),
    "fewer modules": (lambda a: edit(a, target_modules=["q_proj"]), "does not fit its base: the tensor .*v_proj"),
    "another rank": (lambda a: edit(a, r=5), "peft cannot merge the adapter"),
    "a tensor lacks": (retrain(drop), "does not fit its base: the tensor .*layers.1.self_attn.q_proj"),
    "strange tensor": (retrain(lambda s: s | {"strange": torch.ones(1)}), "does not fit its base: the tensor strange"),
    "not finite": (retrain(lambda s: {n: t * float("nan") for n, t in s.items()}), "peft cannot merge|NaN"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_adapters(damage: str, tiny: Tiny, tmp_path: Path) -> None:
    adapter = trained(tiny.model, tmp_path / "adapter")
    change, message = DAMAGES[damage]
    change(adapter)
    with pytest.raises(LrcError, match=message):
        locate(str(adapter))
    assert refused("compress", adapter, *tiny.options(tmp_path / "run", "svd")[1:])
    assert not (tmp_path / "run").exists()


def test_adapters_without_weights_to_merge(tiny: Tiny, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny.model)
    whole = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    whole.save_pretrained(tmp_path / "adapter")
    with pytest.raises(UnsupportedError, match=r"of the kind PROMPT_TUNING .* adds no weights that can be merged"):
        locate(str(tmp_path / "adapter"))


def test_compressed_bases(pristine: Callable[[str], Path], tiny: Tiny, tmp_path: Path) -> None:
    adapter = trained(tiny.model, tmp_path / "adapter")
    edit(adapter, base_model_name_or_path=str(pristine("svd") / "model"))
    with pytest.raises(UnsupportedError, match="is compressed; adapters are merged into dense checkpoints"):
        locate(str(adapter))


def test_without_peft(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = trained(tiny.model, tmp_path / "adapter")
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None if name == "peft" else object())
    with pytest.raises(InputError, match=r"which peft merges .* pip install 'lowrank_compress\[adapters\]'"):
        locate(str(adapter))
