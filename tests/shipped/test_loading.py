from __future__ import annotations

import copy
import gc
import json
import os
import pickle
import subprocess
import sys
import textwrap
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

import lowrank_compress
from lowrank_compress.model.checkpoint import Checkpoint as CheckpointFiles
from lowrank_compress.model.dense import write_dense
from lowrank_compress.shipped import remote
from lowrank_compress.shipped.config import REMOTE_FILE, VERSION, LowRankConfig
from lowrank_compress.shipped.join import joined
from lowrank_compress.shipped.linear import CompressedLinear
from lowrank_compress.shipped.quantizer import LowRankQuantizer, register
from lowrank_compress.shipped.saving import REMOTE_CLASSES, remote_code_entries, write_remote_code
from tests.shipped.test_linear import fill
from tests.tiny import tiny_model, tiny_tokenizer

torch.set_num_threads(1)
pytestmark = pytest.mark.versions

ROOT = Path(lowrank_compress.__file__).parents[1]
# Path pattern, heads, and (rows, format, rank) of each part.
Plan = dict[str, tuple[int, list[tuple[int, str, int]]]]
PLANS: dict[str, Plan] = {
    "llama": {
        "model.layers.{}.self_attn.q_proj": (1, [(32, "pivot", 9)]),
        "model.layers.{}.mlp.up_proj": (1, [(72, "pair", 10)]),
        "model.layers.{}.mlp.down_proj": (1, [(32, "pivot", 12)]),
    },
    "gpt2": {
        "transformer.h.{}.attn.c_attn": (1, [(32, "pivot", 8), (32, "dense", 32), (32, "pair", 6)]),
        "transformer.h.{}.mlp.c_fc": (1, [(72, "pivot", 11)]),
    },
    "gpt_neox": {
        "gpt_neox.layers.{}.attention.query_key_value": (4, [(32, "pivot", 8), (32, "pair", 7), (32, "pivot", 9)]),
        "gpt_neox.layers.{}.mlp.dense_h_to_4h": (1, [(72, "pair", 9)]),
    },
    "bert": {
        "bert.encoder.layer.{}.attention.self.query": (1, [(32, "pivot", 8)]),
        "bert.encoder.layer.{}.intermediate.dense": (1, [(72, "pair", 9)]),
    },
}
CAUSAL = ("llama", "gpt2", "gpt_neox")
IDS = torch.tensor([[5, 9, 2, 30, 41, 7, 3], [11, 4, 8, 8, 60, 23, 90]])


def auto_class(model_type: str) -> Any:
    return AutoModelForCausalLM if model_type in CAUSAL else AutoModelForSequenceClassification


def write(
    directory: Path, model_type: str, shard: int | None = None, dtype: torch.dtype = torch.float32, **overrides: Any
) -> tuple[Path, PreTrainedModel]:
    """A compressed checkpoint with random factors, put together by hand, and the stock dense model it equals.

    `shard` is the number of tensors of a file.
    """
    model = tiny_model(model_type, "lm" if model_type in CAUSAL else "classification", dtype=dtype, **overrides)
    modules: dict[str, Any] = {}
    state = dict(model.state_dict())
    for i in range(2):
        for pattern, (heads, parts) in PLANS[model_type].items():
            path = pattern.format(i)
            dense: Any = model.get_submodule(path)
            shape = dense.weight.shape if isinstance(dense, nn.Linear) else dense.weight.shape[::-1]
            modules[path] = {
                "in_features": shape[1],
                "out_features": shape[0],
                "bias": dense.bias is not None,
                "heads": heads,
                "parts": [{"rows": rows, "format": form, "rank": rank} for rows, form, rank in parts],
            }
            new = CompressedLinear(**modules[path], dtype=dtype)
            fill(new, seed=i)
            with torch.no_grad():
                for factor in new.parameters():
                    factor *= 0.15
                if new.bias is not None:
                    new.bias.copy_(dense.bias)
                weight = new.dense_weight()
                dense.weight.copy_(weight if isinstance(dense, nn.Linear) else weight.T)
            for name in [name for name in state if name.startswith(f"{path}.")]:
                del state[name]
            state |= {f"{path}.{name}": value for name, value in new.state_dict().items()}
    if model.config.tie_word_embeddings:
        state = {name: value for name, value in state.items() if name not in ("lm_head.weight", "embed_out.weight")}
    config = model.config.to_dict()
    config["architectures"] = [type(model).__name__]
    config["dtype"] = str(dtype).removeprefix("torch.")
    config["quantization_config"] = LowRankConfig(modules).to_dict()
    config["auto_map"] = remote_code_entries(model.config)
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    write_remote_code(directory)
    names = list(state)
    step = shard or len(names)
    files = [names[i : i + step] for i in range(0, len(names), step)]
    index: dict[str, str] = {}
    for i, part in enumerate(files):
        file = "model.safetensors" if len(files) == 1 else f"model-{i + 1:05}-of-{len(files):05}.safetensors"
        save_file({name: state[name].contiguous().clone() for name in part}, directory / file, {"format": "pt"})
        index |= dict.fromkeys(part, file)
    if len(files) > 1:
        text = json.dumps({"metadata": {}, "weight_map": index})
        (directory / "model.safetensors.index.json").write_text(text)
    return directory, model


Checkpoint = Callable[..., tuple[Path, PreTrainedModel]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    made: dict[str, tuple[Path, PreTrainedModel]] = {}

    def get(model_type: str = "llama", **options: Any) -> tuple[Path, PreTrainedModel]:
        key = repr((model_type, sorted(options.items())))
        if key not in made:
            made[key] = write(tmp_path_factory.mktemp("checkpoint") / "model", model_type, **options)
        return made[key]

    return get


def stored(directory: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in directory.glob("*.safetensors") for name, value in load_file(file).items()}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def assert_holds(model: nn.Module, directory: Path) -> None:
    """Every stored tensor is in the model, bit for bit, and no other compressed one is."""
    state, files = model.state_dict(), stored(directory)
    assert {n for n in state if "lr_" in n} == {n for n in files if "lr_" in n}
    for name, value in files.items():
        assert state[name].dtype == value.dtype
        assert torch.equal(state[name], value), name


@pytest.mark.parametrize("model_type", PLANS)
def test_loads_bit_for_bit_and_computes_what_the_dense_model_does(checkpoint: Checkpoint, model_type: str) -> None:
    directory, dense = checkpoint(model_type)
    model, info = auto_class(model_type).from_pretrained(directory, output_loading_info=True)
    assert type(model) is type(dense)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_holds(model, directory)
    for layer in model.modules():
        if isinstance(layer, CompressedLinear):
            assert (layer._order is not None) == layer._ordered
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(
        logits(model), logits(tiny_model(model_type, "lm" if model_type in CAUSAL else "classification"))
    )


@pytest.mark.parametrize(
    "options",
    [{"shard": 3}, {"tie_word_embeddings": True}, {"tie_word_embeddings": False}, {"dtype": torch.bfloat16}],
    ids=str,
)
def test_kinds_of_checkpoint(checkpoint: Checkpoint, options: dict[str, Any]) -> None:
    directory, dense = checkpoint("llama", **options)
    for load in ({}, {"device_map": {"": "cpu"}}, {"dtype": "auto"}):
        model = AutoModelForCausalLM.from_pretrained(directory, **load)
        assert_holds(model, directory)
        tied = model.lm_head.weight is model.model.embed_tokens.weight
        assert tied == options.get("tie_word_embeddings", False)
        tolerance = 0.1 if "dtype" in options else 1e-4
        torch.testing.assert_close(logits(model), logits(dense), rtol=tolerance, atol=tolerance)


def first_version(directory: Path, target: Path) -> Path:
    """Copy a checkpoint as the first version wrote it: with indices of twice the size."""
    target = edited(directory, target, lambda settings: settings.update(version=1))
    wider = {name: value.long() if "lr_index" in name else value for name, value in stored(directory).items()}
    (target / "model.safetensors").unlink()
    save_file(wider, target / "model.safetensors", {"format": "pt"})
    return target


@pytest.mark.parametrize("model_type", PLANS)
def test_a_checkpoint_of_the_first_version_loads_bit_for_bit(
    checkpoint: Checkpoint, tmp_path: Path, model_type: str
) -> None:
    directory, _ = checkpoint(model_type)
    old = first_version(directory, tmp_path / "old")
    kinds = {value.dtype for name, value in stored(old).items() if "lr_index" in name}
    assert kinds == {torch.int64}
    expected = auto_class(model_type).from_pretrained(directory)
    for load in ({}, {"device_map": {"": "cpu"}}):
        model, info = auto_class(model_type).from_pretrained(old, output_loading_info=True, **load)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert_holds(model, directory)
        assert torch.equal(logits(model), logits(expected))
    for assign in (False, True):
        model = auto_class(model_type).from_pretrained(directory)
        for name, buffer in model.named_buffers():
            if "lr_index" in name:
                buffer.zero_()
        model.load_state_dict(stored(old), strict=False, assign=assign)
        assert torch.equal(logits(model), logits(expected))
    if model_type == "llama":
        model = auto_class(model_type).from_pretrained(old)
        model.save_pretrained(tmp_path / "again")
        assert_holds(auto_class(model_type).from_pretrained(tmp_path / "again"), directory)
        saved = json.loads((tmp_path / "again" / "config.json").read_text())
        assert saved["quantization_config"]["version"] == 2
        tiny_tokenizer(old)
        tiny_tokenizer(edited(directory, tmp_path / "new", lambda _: None))
        for place in ("old", "new"):
            write_dense(CheckpointFiles(tmp_path / place), tmp_path / f"{place}-dense")
        dense = [stored(tmp_path / f"{place}-dense") for place in ("old", "new")]
        assert all(torch.equal(dense[0][name], value) for name, value in dense[1].items())


def test_dtype_asked_for_is_cast_once(checkpoint: Checkpoint) -> None:
    directory, _ = checkpoint()
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    state = model.state_dict()
    for name, value in stored(directory).items():
        assert torch.equal(state[name], value if "lr_index" in name else value.bfloat16())


@pytest.mark.parametrize("buffers", [False, True])
@pytest.mark.parametrize("place", ["disk", "cpu"])
def test_offloaded(checkpoint: Checkpoint, tmp_path: Path, place: str, buffers: bool) -> None:
    directory, _ = checkpoint("llama", shard=5)
    device_map = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    device_map |= {"model.layers.0": "cpu", "model.layers.1": place}
    model = AutoModelForCausalLM.from_pretrained(
        directory, device_map=device_map, offload_folder=tmp_path, offload_buffers=buffers
    )
    if place == "disk":
        assert model.model.layers[1].mlp.up_proj.lr_in.weight.device.type == "meta"
        with pytest.raises(ValueError, match="not in memory: load the model without offloading"):
            model.dequantize()
    expected = logits(AutoModelForCausalLM.from_pretrained(directory))
    for _ in range(2):
        assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("model_type", CAUSAL)
def test_generate(checkpoint: Checkpoint, model_type: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint(model_type)[0], dtype=torch.float64)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    by_hand = IDS
    for _ in range(6):
        with torch.no_grad():
            scores = model(input_ids=by_hand).logits[:, -1]
        scores[:, model.generation_config.eos_token_id] = -torch.inf
        by_hand = torch.cat([by_hand, scores.argmax(-1, keepdim=True)], 1)
    for cache in ({"use_cache": False}, {}, {"cache_implementation": "static", "disable_compile": True}):
        assert torch.equal(model.generate(IDS, **options, **cache), by_hand), cache


@pytest.mark.parametrize("model_type", CAUSAL)
def test_compiles_without_graph_breaks(checkpoint: Checkpoint, model_type: str) -> None:
    torch._dynamo.reset()
    model = AutoModelForCausalLM.from_pretrained(checkpoint(model_type)[0])
    compiled = torch.compile(model, fullgraph=True, backend="eager" if model_type != "gpt_neox" else "aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(input_ids=IDS, use_cache=False).logits, logits(model), rtol=1e-4, atol=1e-5)
    assert model.hf_quantizer.is_compileable


@pytest.mark.parametrize("model_type", PLANS)
def test_save_round_trip(checkpoint: Checkpoint, tmp_path: Path, model_type: str) -> None:
    directory, _ = checkpoint(model_type)
    model = auto_class(model_type).from_pretrained(directory)
    model.save_pretrained(tmp_path, max_shard_size="9KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    before, after = (json.loads((path / "config.json").read_text()) for path in (directory, tmp_path))
    for key in ("quantization_config", "auto_map", "architectures"):
        assert after[key] == before[key]
    assert (tmp_path / REMOTE_FILE).read_bytes() == (directory / REMOTE_FILE).read_bytes()
    assert stored(tmp_path).keys() == stored(directory).keys()
    again, info = auto_class(model_type).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_holds(again, directory)
    assert torch.equal(logits(again), logits(model))


def test_copies_save_themselves(checkpoint: Checkpoint, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint()[0])
    for name, twin in {"deep": copy.deepcopy(model), "pickled": pickle.loads(pickle.dumps(model))}.items():
        with torch.no_grad():
            twin.lm_head.weight.fill_(1 if name == "deep" else 2)
        twin.save_pretrained(tmp_path / name)
        assert (tmp_path / name / REMOTE_FILE).exists()
        assert stored(tmp_path / name)["lm_head.weight"].mean() == (1 if name == "deep" else 2)
    gc.collect()
    gc.disable()
    try:
        gone = weakref.ref(model)
        del model
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("model_type", PLANS)
def test_base_model(checkpoint: Checkpoint, tmp_path: Path, model_type: str) -> None:
    directory, _ = checkpoint(model_type)
    whole = auto_class(model_type).from_pretrained(directory)
    base, info = AutoModel.from_pretrained(directory, output_loading_info=True)
    assert not info["mismatched_keys"]
    assert not [name for name in info["missing_keys"] if "pooler" not in name]
    with torch.no_grad():
        expected = whole.base_model(input_ids=IDS).last_hidden_state
        assert torch.equal(base(input_ids=IDS).last_hidden_state, expected)
        base.save_pretrained(tmp_path)
        assert torch.equal(AutoModel.from_pretrained(tmp_path)(input_ids=IDS).last_hidden_state, expected)
        headed = auto_class(model_type).from_pretrained(tmp_path)
        assert torch.equal(headed.base_model(input_ids=IDS).last_hidden_state, expected)


def test_casts(checkpoint: Checkpoint) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint()[0])
    assert model.half().dtype == torch.float16
    assert model.float().dtype == torch.float32
    assert model.to(torch.float64).dtype == torch.float64
    assert model.get_buffer("model.layers.0.self_attn.q_proj.lr_index").dtype == torch.int32
    assert logits(model).dtype == torch.float64


@pytest.mark.parametrize("model_type", PLANS)
def test_dequantized_checkpoint_is_a_stock_one(checkpoint: Checkpoint, tmp_path: Path, model_type: str) -> None:
    directory, dense = checkpoint(model_type)
    compressed = auto_class(model_type).from_pretrained(directory)
    expected = logits(compressed)
    model = compressed.dequantize()
    assert model.hf_quantizer is None if hasattr(model, "hf_quantizer") else True
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path)
    assert not (tmp_path / REMOTE_FILE).exists()
    assert not {"quantization_config", "auto_map"} & set(json.loads((tmp_path / "config.json").read_text()))
    again, info = auto_class(model_type).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for name, value in dense.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_dequantize_into_another_dtype(checkpoint: Checkpoint) -> None:
    directory, dense = checkpoint()
    model = AutoModelForCausalLM.from_pretrained(directory).dequantize(dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    for name, value in dense.state_dict().items():
        assert torch.equal(model.state_dict()[name], value.bfloat16())


def test_lora_on_the_factors(checkpoint: Checkpoint, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    directory, _ = checkpoint()
    config = peft.LoraConfig(r=2, target_modules=["lr_in", "lr_out"], task_type="CAUSAL_LM", lora_dropout=0.0)
    torch.manual_seed(0)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(directory), config)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(4):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.eval()
    trained = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(directory), tmp_path / "adapter")
    torch.testing.assert_close(logits(again), trained)
    merged = again.merge_and_unload()
    torch.testing.assert_close(logits(merged), trained, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), logits(merged))


def test_factors_train(checkpoint: Checkpoint) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint()[0])
    model.train()
    model.gradient_checkpointing_enable()
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in model.named_parameters() if "lr_" in n)
    assert model.hf_quantizer.is_trainable


def edited(directory: Path, target: Path, edit: Callable[[dict[str, Any]], None]) -> Path:
    target.mkdir()
    for file in directory.iterdir():
        (target / file.name).symlink_to(file)
    config = json.loads((directory / "config.json").read_text())
    edit(config["quantization_config"])
    (target / "config.json").unlink()
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda q: q.update(version=11), "of low-rank format version 11, but this code reads versions 1 to 10: update"),
        (
            lambda q: q["modules"].update({"model.x": next(iter(q["modules"].values()))}),
            "names the module model.x, which",
        ),
    ],
)
def test_config_that_does_not_fit(
    checkpoint: Checkpoint, tmp_path: Path, edit: Callable[[dict[str, Any]], None], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(edited(checkpoint()[0], tmp_path / "model", edit))


def test_smaller_feed_forward(tmp_path: Path) -> None:
    """dense_shapes: two layers of unlike width, one of them with a factor too; the dense export is stock again."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 96}
    model = LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=24))
    shapes: dict[str, list[int]] = {}
    for i, width in enumerate((20, 12)):
        mlp = model.model.layers[i].mlp
        mlp.gate_proj, mlp.up_proj = nn.Linear(16, width, bias=False), nn.Linear(16, width, bias=False)
        mlp.down_proj = nn.Linear(width, 16, bias=False)
        for name in ("gate_proj", "up_proj", "down_proj"):
            shapes[f"model.layers.{i}.mlp.{name}"] = list(getattr(mlp, name).weight.shape)
    expected = logits(model)
    model.config.quantization_config = LowRankConfig({}, shapes)
    model.save_pretrained(tmp_path / "small")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert torch.equal(logits(loaded), expected)
    loaded.dequantize().save_pretrained(tmp_path / "dense")
    config = AutoConfig.from_pretrained(tmp_path / "dense")
    assert not hasattr(config, "quantization_config")
    torch.testing.assert_close(logits(LlamaForCausalLM.from_pretrained(tmp_path / "dense")), expected)


# ---- with and without the package, in processes of their own


def python(script: str, *args: Any, cache: Path) -> str:
    """Run a script away from this repository: isolated, with no path to the package unless the script adds it."""
    environment = {**os.environ, "HF_MODULES_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, "-I", "-c", textwrap.dedent(script), *map(str, args)]
    done = subprocess.run(command, env=environment, cwd=cache, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


WITHOUT_PACKAGE = """
    import json, sys, torch
    sys.modules["lowrank_compress"] = None  # not importable, even where it is installed
    torch.set_num_threads(1)
    import transformers
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
    places = json.loads(sys.argv[1])
    ids = torch.tensor(json.loads(sys.argv[2]))

    for auto, directory in places:
        try:
            getattr(transformers, auto).from_pretrained(directory)
        except RuntimeError as error:
            assert "mismatch" in str(error), error
        else:
            raise AssertionError(f"{directory} was loaded by code that does not know it")
    assert "lowrank" not in AUTO_QUANTIZER_MAPPING

    models = {}
    for auto, directory in places:
        model = getattr(transformers, auto).from_pretrained(directory, trust_remote_code=True)
        assert type(model).__module__.startswith("transformers.models."), type(model)
        models[directory] = model
        model.save_pretrained(directory + "-again", max_shard_size="9KB")
        again = getattr(transformers, auto).from_pretrained(directory + "-again", trust_remote_code=True)
        with torch.no_grad():
            assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
            torch.save(model(input_ids=ids).logits, directory + "-logits.pt")
    assert any("modeling_lowrank" in name for name in sys.modules)
    assert AUTO_QUANTIZER_MAPPING["lowrank"].__module__.startswith("transformers_modules.")

    # Each checkpoint is loaded by its own copy of the code, also when others were loaded in between.
    owners = []
    for auto, directory in (places[0], places[1], places[0]):
        getattr(transformers, auto).from_pretrained(directory, trust_remote_code=True)
        owners.append(AUTO_QUANTIZER_MAPPING["lowrank"].__module__)
    assert owners[0] == owners[2] != owners[1], owners

    base = transformers.AutoModel.from_pretrained(places[0][1], trust_remote_code=True, dtype=torch.bfloat16)
    assert base.dtype == torch.bfloat16 and type(base).__name__ == "LlamaModel"
    assert models[places[0][1]].dequantize().model.layers[0].mlp.up_proj.weight.shape == (72, 32)

    # An adapter's directory names the checkpoint it belongs to.
    try:
        import peft
    except ImportError:
        pass
    else:
        name, directory = places[0]
        lora = peft.LoraConfig(r=2, target_modules=["lr_in", "lr_out"], init_lora_weights=False)
        adapted = peft.get_peft_model(
            getattr(transformers, name).from_pretrained(directory, trust_remote_code=True), lora
        )
        adapted.save_pretrained(directory + "-adapter")
        again = getattr(transformers, name).from_pretrained(directory + "-adapter", trust_remote_code=True)
        with torch.no_grad():
            torch.testing.assert_close(again(input_ids=ids).logits, adapted(input_ids=ids).logits)

    # The package, imported later, takes over, and keeps its place when remote code is run again.
    del sys.modules["lowrank_compress"]
    sys.path.insert(0, sys.argv[3])
    import lowrank_compress
    from lowrank_compress.shipped.linear import CompressedLinear
    from lowrank_compress.shipped.quantizer import LowRankQuantizer
    assert AUTO_QUANTIZER_MAPPING["lowrank"] is LowRankQuantizer
    for trust in (True, None, False):
        model = transformers.AutoModelForCausalLM.from_pretrained(places[0][1], trust_remote_code=trust)
        assert type(model.model.layers[0].mlp.up_proj) is CompressedLinear
        assert AUTO_QUANTIZER_MAPPING["lowrank"] is LowRankQuantizer
"""


@pytest.mark.slow
def test_remote_code_without_the_package_and_loud_failure_without_either(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    places = []
    for model_type in PLANS:
        if model_type == "gpt_neox":
            copied = first_version(checkpoint(model_type)[0], tmp_path / model_type)
        else:
            copied = edited(checkpoint(model_type)[0], tmp_path / model_type, lambda _: None)
        places.append((auto_class(model_type).__name__, str(copied)))
    (tmp_path / "cache").mkdir()
    python(WITHOUT_PACKAGE, json.dumps(places), json.dumps(IDS.tolist()), ROOT, cache=tmp_path / "cache")
    for name, directory in places:
        model = getattr(sys.modules["transformers"], name).from_pretrained(f"{directory}-again")
        assert torch.equal(logits(model), torch.load(f"{directory}-logits.pt"))


OLD_CODE = """
    import json, sys, torch
    sys.modules["lowrank_compress"] = None
    torch.set_num_threads(1)
    from transformers import AutoModelForCausalLM
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
    first, second, root, ids = sys.argv[1], sys.argv[2], sys.argv[3], torch.tensor(json.loads(sys.argv[4]))

    def logits(directory, **options):
        with torch.no_grad():
            return AutoModelForCausalLM.from_pretrained(directory, **options)(input_ids=ids).logits

    # Without the package the checkpoint's own code counts; and it registers first.
    old = logits(first, trust_remote_code=True)
    assert AUTO_QUANTIZER_MAPPING["lowrank"].__module__.startswith("transformers_modules.")
    del sys.modules["lowrank_compress"]
    sys.path.insert(0, root)
    import lowrank_compress
    for directory in (first, second, first):  # the second one's code runs for the first time when the package is there
        for trust in (True, None, False):
            assert not torch.equal(logits(directory, trust_remote_code=trust), old)
            assert AUTO_QUANTIZATION_CONFIG_MAPPING["lowrank"].__module__ == "lowrank_compress.shipped.config"
            # By this name, under which the first versions had all in one file, their copies know it too.
            assert AUTO_QUANTIZER_MAPPING["lowrank"].__module__ == "lowrank_compress.model.layers"
    model = AutoModelForCausalLM.from_pretrained(second, trust_remote_code=True)
    assert type(model.model.layers[0].mlp.up_proj).__module__ == "lowrank_compress.shipped.linear"
    model.save_pretrained(second + "-again")
    torch.save((old, logits(second, trust_remote_code=True)), first + "-logits.pt")
"""


@pytest.mark.slow
def test_the_package_wins_over_the_code_in_a_checkpoint(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Over code of another version, which differs visibly, whichever of the two registers first."""
    code = joined()
    last = "return y if self.bias is None else y + self.bias"
    assert code.count(last) == 1
    places = [edited(checkpoint()[0], tmp_path / name, lambda _: None) for name in ("first", "second")]
    for place in places:
        (place / REMOTE_FILE).unlink()
        (place / REMOTE_FILE).write_text(code.replace(last, "return 2 * y"), encoding="utf-8")
    (tmp_path / "cache").mkdir()
    python(OLD_CODE, *places, ROOT, json.dumps(IDS.tolist()), cache=tmp_path / "cache")
    old, new = torch.load(tmp_path / "first-logits.pt")
    expected = logits(AutoModelForCausalLM.from_pretrained(checkpoint()[0]))
    assert not torch.allclose(old, expected, rtol=0.1)
    assert torch.equal(new, expected)
    assert (tmp_path / "second-again" / REMOTE_FILE).read_text(encoding="utf-8") == code


def test_a_later_version_is_refused_by_name(checkpoint: Checkpoint, tmp_path: Path) -> None:
    later = edited(checkpoint()[0], tmp_path / "later", lambda settings: settings.update(version=VERSION + 1))
    for trust in (None, False):
        with pytest.raises(ValueError, match=r"of low-rank format version 11, but this code reads versions 1 to 10"):
            AutoModelForCausalLM.from_pretrained(later, trust_remote_code=trust)


PACKAGE_FIRST = """
    import sys
    sys.path.insert(0, sys.argv[2])
    import lowrank_compress
    assert not {"torch", "transformers"} & set(sys.modules)
    before = list(sys.meta_path)
    import transformers
    assert "lowrank_compress.shipped.linear" not in sys.modules
    model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
    print(type(model.model.layers[0].mlp.up_proj).__module__)
    assert not any(type(finder).__module__ == "lowrank_compress" for finder in sys.meta_path)
    table = sys.modules["transformers.quantizers.auto"]
    assert type(table.__loader__).__name__ == type(table.__spec__.loader).__name__ == "SourceFileLoader"
"""

PACKAGE_LAST = """
    import sys
    from transformers import AutoModelForCausalLM
    sys.path.insert(0, sys.argv[2])
    import lowrank_compress
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
    print(type(model.model.layers[0].mlp.up_proj).__module__)
"""

LAYERS_DIRECTLY = """
    import sys
    sys.path.insert(0, sys.argv[2])
    from lowrank_compress.shipped.linear import CompressedLinear
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
    print(type(model.model.layers[0].mlp.up_proj).__module__)
"""


@pytest.mark.slow
@pytest.mark.parametrize("script", [PACKAGE_FIRST, PACKAGE_LAST, LAYERS_DIRECTLY], ids=["first", "last", "layers"])
def test_either_order_of_imports(checkpoint: Checkpoint, tmp_path: Path, script: str) -> None:
    assert python(script, checkpoint()[0], ROOT, cache=tmp_path).split() == ["lowrank_compress.shipped.linear"]


def test_registering_again_changes_nothing_and_a_stranger_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    before = AUTO_QUANTIZER_MAPPING["lowrank"], AUTO_QUANTIZATION_CONFIG_MAPPING["lowrank"]
    register()
    assert before == (LowRankQuantizer, LowRankConfig)
    assert before == (AUTO_QUANTIZER_MAPPING["lowrank"], AUTO_QUANTIZATION_CONFIG_MAPPING["lowrank"])
    monkeypatch.setitem(AUTO_QUANTIZER_MAPPING, "lowrank", AUTO_QUANTIZER_MAPPING["gptq"])
    with pytest.raises(RuntimeError, match=r"another quantizer, .*Gptq.*, is already registered as 'lowrank'"):
        register()


def test_a_dense_model_cannot_be_compressed_by_loading_it(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="does require the model to be pre-quantized"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=LowRankConfig())


def test_auto_map_names_only_classes_with_a_native_model(checkpoint: Checkpoint) -> None:
    entries = remote_code_entries(AutoConfig.from_pretrained(checkpoint()[0]))
    assert entries["AutoModelForCausalLM"] == "modeling_lowrank.LowRankForCausalLM"
    assert "AutoModelForMaskedLM" not in entries
    assert entries["AutoConfig"] == "modeling_lowrank.LowRankAutoConfig"
    for name, reference in entries.items():
        assert getattr(remote, reference.split(".")[1]).auto_class == name


def test_every_class_of_remote_code_is_there() -> None:
    assert {name: getattr(remote, remote_class).auto_class for name, remote_class in REMOTE_CLASSES.items()} == {
        name: name for name in REMOTE_CLASSES
    }
