"""What is read is what transformers loads, or is refused by name before any work."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from lowrank_compress.errors import CheckpointError, LrcError, NumericsError, UnsupportedError
from lowrank_compress.evaluation.replayed import walked
from lowrank_compress.model.blueprint import blueprint
from lowrank_compress.model.checkpoint import Checkpoint
from lowrank_compress.model.shards import INDEX, SINGLE
from lowrank_compress.model.skeleton import Skeleton
from lowrank_compress.model.walk.batch import Batch
from tests.ordinary import tokens
from tests.runs import Tiny, done, looks_finished, refused
from tests.tiny import save_tiny, tiny_tokenizer

State = dict[str, Tensor]
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def model(tiny: Tiny, tmp_path: Path) -> Path:
    """A tiny llama that a test may spoil."""
    return shutil.copytree(tiny.model, tmp_path / "model")


def configure(model: Path, **fields: object) -> None:
    settings = json.loads((model / "config.json").read_text()) | fields
    (model / "config.json").write_text(json.dumps(settings))


def rewrite(model: Path, change: Callable[[State], State], name: str = SINGLE) -> None:
    save_file(change(load_file(model / SINGLE)), model / name, {"format": "pt"})


def split(model: Path) -> None:
    """Store the weights in two shards with an index, in place of the single file."""
    state = load_file(model / SINGLE)
    names = sorted(state)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, keys in parts.items():
        save_file({key: state[key] for key in keys}, model / file, {"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": {key: file for file, keys in parts.items() for key in keys}}
    (model / INDEX).write_text(json.dumps(index))
    (model / SINGLE).unlink()


def edit_index(model: Path, **entries: str | None) -> None:
    index = json.loads((model / INDEX).read_text())
    for key, file in entries.items():
        if file is None:
            del index["weight_map"][key]
        else:
            index["weight_map"][key] = file
    (model / INDEX).write_text(json.dumps(index))


def assert_as_transformers(model: Path) -> Blueprinted:
    """Logits and the tensors that are dropped are those of `from_pretrained` without any argument."""
    stock, info = AutoModelForCausalLM.from_pretrained(model, output_loading_info=True)
    assert not info["missing_keys"]
    ids = torch.stack(tokens(9, 9))
    with torch.no_grad():
        expected = stock.double()(input_ids=ids).logits
    skeleton = Skeleton(Checkpoint(model), torch.device("cpu"), torch.float64)
    (walk,) = walked(skeleton, [Batch(ids)])
    with torch.no_grad():
        found = walk.head(0, walk.leaving(0))
    assert (found - expected).abs().max() < 1e-6 * expected.abs().max()
    said = " ".join(skeleton.blueprint.warnings)
    assert bool(said) == bool(info["unexpected_keys"])
    return info["unexpected_keys"], said


Blueprinted = tuple[set[str], str]


# --- Which files


def test_a_single_file_counts_before_an_index(model: Path) -> None:
    shutil.copytree(model, model.parent / "whole")
    split(model)
    rewrite(model.parent / "whole", lambda state: {name: 2 * tensor for name, tensor in state.items()})
    shutil.copy(model.parent / "whole" / SINGLE, model / SINGLE)
    assert_as_transformers(model)


def test_shards_and_links_into_a_cache(model: Path) -> None:
    split(model)
    assert_as_transformers(model)
    (model.parent / "blobs").mkdir()
    for number, path in enumerate(sorted(model.iterdir())):
        path.rename(model.parent / "blobs" / str(number))
        path.symlink_to(f"../blobs/{number}")
    assert_as_transformers(model)


def test_pickles_and_variants_beside_the_weights_are_ignored(model: Path) -> None:
    (model / "pytorch_model.bin").write_bytes(b"none")
    rewrite(model, lambda state: {name: 3 * tensor for name, tensor in state.items()}, "model.fp16.safetensors")
    rewrite(model, lambda state: {name: 4 * tensor for name, tensor in state.items()}, "consolidated.safetensors")
    assert_as_transformers(model)


@pytest.mark.parametrize("name", ["model.fp16.safetensors", "model-00001-of-00001.safetensors", "weights.safetensors"])
def test_other_names_are_not_loaded(name: str, model: Path) -> None:
    (model / SINGLE).rename(model / name)
    with pytest.raises(OSError, match="no file named"):
        AutoModelForCausalLM.from_pretrained(model)
    with pytest.raises(CheckpointError, match=rf"has {name}, but neither {SINGLE} nor {INDEX}"):
        blueprint(Checkpoint(model))


FIRST = "model-00001-of-00002.safetensors"
SECOND = "model-00002-of-00002.safetensors"


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({UP: "nothing.safetensors"}, "nothing.safetensors is missing, though"),
        ({UP: "../model/" + FIRST}, r"expected the name of a \.safetensors file in the same directory"),
        ({UP: "/etc/passwd"}, r"expected the name of a \.safetensors file in the same directory"),
        ({UP: 3}, r"expected the name of a \.safetensors file in the same directory"),
        ({"strange": FIRST}, "says that the tensor strange is in model-00001-of-00002.safetensors, which does not"),
    ],
)
def test_an_index_that_does_not_fit(entries: dict[str, Any], message: str, model: Path) -> None:
    split(model)
    edit_index(model, **entries)
    with pytest.raises(CheckpointError, match=message):
        blueprint(Checkpoint(model))


def test_shards_that_do_not_fit_the_index(model: Path) -> None:
    split(model)
    index = json.loads((model / INDEX).read_text())["weight_map"]
    # transformers loads whatever is in the shards that the index names.
    edit_index(model, **{UP: None})
    assert_as_transformers(model)
    edit_index(model, **{UP: SECOND if index[UP] == FIRST else FIRST})
    with pytest.raises(CheckpointError, match="which does not hold it"):
        blueprint(Checkpoint(model))
    edit_index(model, **{UP: index[UP]})
    first, second = (load_file(model / name) for name in (FIRST, SECOND))
    save_file(first | second, model / FIRST, {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"is in two shards, .*{FIRST} and .*{SECOND}"):
        blueprint(Checkpoint(model))


@pytest.mark.parametrize("content", [{}, {"weight_map": {}, "metadata": {}}, {"weight_map": [1], "metadata": {}}])
def test_an_index_that_is_none(content: object, model: Path) -> None:
    split(model)
    (model / INDEX).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="has no weight_map"):
        blueprint(Checkpoint(model))


# --- Shapes and dtypes


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vocab_size": 97}, r"lm_head\.weight of .* has the shape 96 × 32, but the config asks for 97 × 32"),
        ({"vocab_size": 95}, r"has the shape 96 × 32, but the config asks for 95 × 32"),
        ({"intermediate_size": 71}, r"_proj\.weight of .* but the config asks for"),
        ({"hidden_size": 36}, "but the config asks for"),
        ({"num_key_value_heads": 4}, r"k_proj\.weight of .* has the shape 16 × 32, but the config asks for 32 × 32"),
        ({"num_hidden_layers": 3}, r"has no tensor model\.layers\.2\..* and 4 more, which its config asks for"),
        ({"mlp_bias": True}, r"has no tensor model\.layers\.0\.mlp\.gate_proj\.bias"),
    ],
)
def test_a_config_that_does_not_fit(fields: dict[str, Any], message: str, model: Path) -> None:
    configure(model, **fields)
    with pytest.raises(CheckpointError, match=message):
        blueprint(Checkpoint(model))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: torch.cat([t, t], -1), "has the shape 72 × 64"),
        (lambda t: t[None], "has the shape 1 × 72 × 32"),
        (lambda t: t[:0], "has the shape 0 × 32"),
        (lambda t: t.to(torch.int32), "is stored as I32; expected F64, F32, F16, BF16"),
        (lambda t: t.to(torch.int8), "is stored as I8"),
        (lambda t: t.bool(), "is stored as BOOL"),
        (lambda t: t.to(torch.complex64), "is stored as C64"),
        (lambda t: t.to(torch.float8_e4m3fn), "is stored as F8_E4M3"),
        (lambda t: t.to(torch.float8_e5m2), "is stored as F8_E5M2"),
        (lambda t: t.view(torch.uint8).view(torch.float8_e8m0fnu), "is stored as F8_E8M0"),
        (lambda t: t.view(torch.uint8).view(torch.float4_e2m1fn_x2), "is stored as F4"),
    ],
)
@pytest.mark.parametrize("name", [UP, "model.norm.weight", "model.embed_tokens.weight"])
def test_a_tensor_that_does_not_fit(change: Callable[[Tensor], Tensor], message: str, name: str, model: Path) -> None:
    """Whatever the method, in every command, and before anything is written."""
    rewrite(model, lambda state: state | {name: change(state[name])})
    if "shape" in message:
        message = "has the shape"
    with pytest.raises(LrcError, match=f"The tensor {name} of .* {message}"):
        blueprint(Checkpoint(model))


@pytest.mark.parametrize("method", ["svd", "svd-llm", "auto"])
def test_nothing_is_done_first(method: str, model: Path, tiny: Tiny, tmp_path: Path) -> None:
    configure(model, vocab_size=97)
    message = refused("compress", model, *tiny.options(tmp_path / "run", method)[1:])
    assert "The tensor lm_head.weight of" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "companion",
    ["weight_scale", "weight_scale_inv", "qweight", "qzeros", "scales", "g_idx", "weight.absmax", "SCB",
     "weight.quant_state.bitsandbytes__nf4", "weight_packed"],
)  # fmt: skip
def test_what_only_quantized_weights_have(companion: str, model: Path) -> None:
    name = UP.removesuffix("weight") + companion
    rewrite(model, lambda state: state | {name: torch.ones(3)})
    with pytest.raises(UnsupportedError, match=rf"is quantized: it stores {name} \(F32\)"):
        blueprint(Checkpoint(model))


@pytest.mark.parametrize(
    ("stored", "said"),
    [(torch.float32, "bfloat16"), (torch.float32, "float16"), (torch.float64, "float32"), (torch.bfloat16, "float32"),
     (torch.float16, None), (torch.float64, None)],
)  # fmt: skip
def test_weights_are_read_as_from_pretrained_gives_them(stored: torch.dtype, said: str | None, model: Path) -> None:
    """The config's dtype rounds what is stored; without one the first tensor's dtype does."""

    def mixed(state: State) -> State:
        return {name: t if "norm" in name and name != "lm_head.weight" else t.to(stored) for name, t in state.items()}

    rewrite(model, mixed)
    configure(model, dtype=said)
    stock = AutoModelForCausalLM.from_pretrained(model)
    checkpoint = Checkpoint(model)
    assert checkpoint.dtype == stock.dtype == (stored if said is None else getattr(torch, said))
    for name, tensor in stock.state_dict().items():
        read = blueprint(checkpoint).read(name)
        assert read.dtype == tensor.dtype
        assert torch.equal(read, tensor), name


@pytest.mark.parametrize("said", ["int8", "bool", "complex64", "float8_e4m3fn", "nonsense", 3, ["float32"]])
def test_a_dtype_that_weights_cannot_have(said: object, model: Path) -> None:
    configure(model, dtype=said)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        blueprint(Checkpoint(model))


# --- Tensors that the model does not know


def strange(state: State) -> State:
    return state | {"v_head.summary.weight": torch.ones(1, 32), "score.weight": torch.ones(2, 32)}


def biases(state: State) -> State:
    return state | {
        f"{name.removesuffix('weight')}bias": torch.ones(len(t)) for name, t in state.items() if "_proj" in name
    }


@pytest.mark.parametrize(
    ("change", "fields", "named"),
    [
        (strange, {}, "2 tensors that its config has no place for, and that transformers drops: score.weight, v_head"),
        (biases, {}, "14 tensors that its config has no place for"),
        (dict, {"num_hidden_layers": 1}, "model.layers.1.input_layernorm.weight"),
        (lambda state: state | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, {}, ""),
    ],
)
def test_what_transformers_drops_is_told(
    change: Callable[[State], State], fields: dict[str, Any], named: str, model: Path
) -> None:
    rewrite(model, change)
    configure(model, **fields)
    unexpected, said = assert_as_transformers(model)
    assert named in said
    if len(unexpected) <= 5:
        assert all(name in said for name in unexpected)


def test_old_masks_are_dropped_in_silence(tmp_path: Path) -> None:
    save_tiny("gpt2", tmp_path)
    rewrite(tmp_path, lambda state: state | {"transformer.h.0.attn.bias": torch.ones(1, 1, 9, 9)})
    assert assert_as_transformers(tmp_path) == (set(), "")


def test_a_tensor_stored_under_two_names(tmp_path: Path) -> None:
    save_tiny("gpt2", tmp_path)
    rewrite(tmp_path, lambda state: state | {"h.0.ln_1.weight": 2 * state["transformer.h.0.ln_1.weight"]})
    with pytest.raises(CheckpointError, match=r"stores the tensor transformer\.h\.0\.ln_1\.weight twice, as"):
        blueprint(Checkpoint(tmp_path))


def test_commands_warn(model: Path, tiny: Tiny, tmp_path: Path) -> None:
    rewrite(model, strange)
    said = done("compress", model, *tiny.options(tmp_path / "run", "svd")[1:])
    assert "transformers drops: score.weight, v_head.summary.weight" in said.text
    said = done("eval", model, "--perplexity", tiny.heldout)
    assert "transformers drops: score.weight, v_head.summary.weight" in said.text


# --- quantization_config


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3, "has a malformed quantization_config (3)"),
        ([], "has a malformed quantization_config ([])"),
        ({}, "has a malformed quantization_config ({})"),
        ({"quant_method": None}, "has a malformed quantization_config"),
        ({"quant_method": 7}, "has a malformed quantization_config"),
        ("lowrank", "has a malformed quantization_config (lowrank)"),
        ({"quant_method": "of-tomorrow", "bits": 3}, "is quantized (of-tomorrow); expected plain floating-point"),
        (
            {"quant_method": "lowrank", "version": 99},
            "was compressed by a later version of this program (format version 99;",
        ),
        ({"quant_method": "lowrank", "modules": {"a": {}}}, "has a malformed quantization_config"),
        ({"quant_method": "lowrank", "modules": 3}, "has a malformed quantization_config"),
    ],
)
def test_quantization_config(value: object, message: str, model: Path, tiny: Tiny, tmp_path: Path) -> None:
    configure(model, quantization_config=value)
    options = tiny.options(tmp_path / "run", "svd")[1:]
    for command in (
        ("compress", model, *options),
        ("compress", model, *options, "--dry-run"),
        ("calibrate", model, *tiny.options(tmp_path / "run", "svd-llm")[1:]),
        ("eval", model, "--perplexity", tiny.heldout),
        ("export", model, "--dense", tmp_path / "out"),
        ("bench", model, "--against", tiny.model),
    ):
        assert message in refused(*command), command
    assert looks_finished(tmp_path) == []


# --- Sizes that cannot be


ABSURD: list[dict[str, Any]] = [
    {"num_labels": 2**63},
    {"num_labels": "three"},
    {"vocab_size": 2**40},
    {"vocab_size": 2**70},
    {"vocab_size": -1},
    {"vocab_size": 1.5},
    {"vocab_size": True},
    {"hidden_size": 0},
    {"hidden_size": -32},
    {"hidden_size": "32"},
    {"hidden_size": [32]},
    {"num_hidden_layers": 0},
    {"num_hidden_layers": 10**9},
    {"num_attention_heads": 5},
    {"num_attention_heads": 0},
    {"num_key_value_heads": 3},
    {"head_dim": 10**9},
    {"head_dim": 7},
    {"intermediate_size": 10**12},
    {"max_position_embeddings": "long"},
    {"max_position_embeddings": -1},
    {"max_position_embeddings": 2**63},
    {"id2label": 3},
    {"id2label": {"x": 1}},
    {"hidden_act": "none such"},
    {"rope_parameters": {"rope_type": "none such"}},
    {"layer_types": ["x"] * 3},
    {"rms_norm_eps": "small"},
    {"architectures": [3]},
    {"architectures": 3},
    {"model_type": 3},
    {"model_type": None},
    {"pad_token_id": 10**6},
    {"text_config": 3},
    {"text_config": {"vocab_size": 3}},
    {"num_hidden_layers": None},
    {"transformers_weights": "other.safetensors"},
]


@pytest.mark.parametrize("fields", ABSURD, ids=str)
def test_absurd_configs_end_at_once(fields: dict[str, Any], model: Path, tiny: Tiny, tmp_path: Path) -> None:
    configure(model, **fields)
    began = time.monotonic()
    message = refused("compress", model, *tiny.options(tmp_path / "run", "svd")[1:])
    assert time.monotonic() - began < 10
    assert len(message) < 700
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["config.json", SINGLE, "model.safetensors.index.json", "tokenizer.json"])
def test_files_that_are_none(name: str, model: Path, tiny: Tiny, tmp_path: Path) -> None:
    """Named pipes would be waited for, for ever."""
    import os

    if name == INDEX:
        split(model)
    (model / name).unlink(missing_ok=True)
    os.mkfifo(model / name)
    refused("compress", model, *tiny.options(tmp_path / "run", "svd-llm")[1:])


# --- Numbers that the output dtype does not have


def large(value: float, name: str) -> Callable[[State], State]:
    def change(state: State) -> State:
        state[name].view(-1)[5] = value
        return state

    return change


@pytest.mark.parametrize(
    ("name", "value"), [(UP, 1e12), ("model.norm.weight", 123456.0), ("model.embed_tokens.weight", -7e4)]
)
def test_overflow_of_the_output_dtype(name: str, value: float, model: Path, tiny: Tiny, tmp_path: Path) -> None:
    rewrite(model, large(value, name))
    run = tmp_path / "run"
    message = refused("compress", model, *tiny.options(run, "svd")[1:], "--dtype", "float16")
    assert "beyond 65504, the largest of float16. Pass --dtype bfloat16" in message
    assert name.removesuffix(".weight") in message
    assert "model" not in looks_finished(run)
    done("compress", model, *tiny.options(tmp_path / "other", "svd")[1:], "--dtype", "bfloat16")


def test_overflow_of_a_dense_export(model: Path, tiny: Tiny, tmp_path: Path) -> None:
    """The square roots of a singular value fit into float16, their product does not."""
    rewrite(model, large(123456.0, UP))
    done("compress", model, *tiny.options(tmp_path / "run", "svd")[1:], "--dtype", "float16")
    message = refused("export", tmp_path / "run", "--dense", tmp_path / "dense")
    assert f"{UP} would be written with 1 NaN or infinite elements of 2304 in float16" in message
    assert not (tmp_path / "dense").exists()


def test_overflow_of_the_dtype_of_the_config(model: Path) -> None:
    rewrite(model, large(-1e6, UP))
    configure(model, dtype="float16")
    with pytest.raises(NumericsError, match=f"{UP} of .* has the value 1e\\+06, beyond 65504, the largest of float16"):
        blueprint(Checkpoint(model)).read(UP)


def test_every_tensor_counts(model: Path) -> None:
    """No tensor of the checkpoint is without its check: each in turn gets a wrong shape, a wrong dtype, or is away."""
    state: Mapping[str, Tensor] = load_file(model / SINGLE)
    for name in state:
        for change, message in (
            (lambda t: t[:-1].contiguous(), "has the shape"),
            (lambda t: t.to(torch.int16), "is stored as I16"),
        ):
            save_file({**state, name: change(state[name])}, model / SINGLE, {"format": "pt"})
            with pytest.raises(LrcError, match=f"The tensor {name} of .* {message}"):
                blueprint(Checkpoint(model))
        save_file({key: state[key] for key in state if key != name}, model / SINGLE, {"format": "pt"})
        with pytest.raises(CheckpointError, match=f"has no tensor {name}, which"):
            blueprint(Checkpoint(model))


@pytest.mark.parametrize("labels", [3, ["a"], {"a": "first"}, {"a": 1.5}, {"a": -1}])
def test_malformed_labels(labels: object, model: Path) -> None:
    configure(model, label2id=labels)
    with pytest.raises(CheckpointError, match="has a malformed label2id"):
        blueprint(Checkpoint(model))


def test_an_adapter_that_was_put_beside_a_compressed_checkpoint(finished: Callable[[str], Path], tiny: Tiny) -> None:
    """transformers would load it on top, and give other numbers than ours."""
    run = finished("svd")
    (run / "model/adapter_config.json").write_text("{}")
    for command in (("eval", run, "--perplexity", tiny.heldout), ("export", run, "--dense", run.parent / "out")):
        assert "adapter_config.json" in refused(*command)


def test_what_a_compressed_checkpoint_must_not_say(finished: Callable[[str], Path]) -> None:
    model = finished("svd") / "model"
    configure(model, quantization_config=3)
    assert "has a malformed quantization_config (3)" in refused("show", model)


def test_small_files_that_are_large_or_deep(model: Path, tiny: Tiny) -> None:
    """A sparse file takes no disk, and hours to hash."""
    for name in ("tokenizer.json", "generation_config.json", "config.json", SINGLE):
        content = (model / name).read_bytes()
        with open(model / name, "r+b") as file:
            file.truncate(1 << 41)
        assert str(model / name) in refused("eval", model, "--perplexity", tiny.heldout)
        (model / name).unlink()
        (model / name).write_bytes(content)
    (model / "generation_config.json").write_text("[" * 100_000)
    assert "generation_config.json" in refused("eval", model, "--perplexity", tiny.heldout)


def test_labels_beyond_the_classes(model: Path) -> None:
    configure(model, id2label={"0": "a", "1": "b"}, label2id={"a": 0, "b": 2})
    with pytest.raises(CheckpointError, match="gives the label 'b' the number 2 of only 2 classes"):
        _ = Checkpoint(model).class_ids


# --- Tokens that the model does not know


def grown(model: Path) -> None:
    """Give the tokenizer more tokens than the model has."""
    tokenizer = tiny_tokenizer(model)
    tokenizer.add_tokens(["[new]"])
    tokenizer.save_pretrained(model)


@pytest.mark.parametrize("command", ["calibrate", "eval"])
def test_a_token_beyond_the_embedding_is_named(command: str, model: Path, tiny: Tiny, tmp_path: Path) -> None:
    grown(model)
    (tmp_path / "text.txt").write_text(tiny.text.read_text() + " [new] the fox")
    options = {
        "calibrate": tuple(tiny.options(tmp_path / "run", "svd-llm", text=tmp_path / "text.txt")[1:]),
        "eval": ("--perplexity", tmp_path / "text.txt"),
    }
    message = refused(command, model, *options[command])
    assert "The tokenizer makes the token '[new]' with id 96, but the model has embeddings for ids below 96" in message
    assert looks_finished(tmp_path) == []
    # A text without it is none of its business.
    done("eval", model, "--perplexity", tiny.heldout)


def test_a_bos_beyond_the_embedding_is_named(model: Path, tiny: Tiny) -> None:
    tokenizer = tiny_tokenizer(model)
    settings = json.loads((model / "tokenizer.json").read_text())
    settings["added_tokens"].append({**settings["added_tokens"][1], "id": 96, "content": "<new>"})
    settings["post_processor"]["special_tokens"]["<s>"] |= {"ids": [96]}
    (model / "tokenizer.json").write_text(json.dumps(settings))
    options = json.loads((model / "tokenizer_config.json").read_text()) | {"bos_token": "<new>"}
    (model / "tokenizer_config.json").write_text(json.dumps(options))
    assert tokenizer.bos_token_id == 1
    assert "the token '<new>' with id 96" in refused("eval", model, "--perplexity", tiny.heldout)


def test_a_token_of_an_example_beyond_the_embedding_is_named(tmp_path: Path) -> None:
    model = save_tiny("bert", tmp_path / "model", "classification")
    grown(model)
    (tmp_path / "table.csv").write_text("text,label\nthe fox,0\n[new] the fox,1\n")
    message = refused("eval", model, "--classification", tmp_path / "table.csv", "--text-column", "text",
                      "--label-column", "label")  # fmt: skip
    assert "the token '[new]' with id 96" in message
