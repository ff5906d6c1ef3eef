from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lowrank_compress.errors import CheckpointError, UnsupportedError
from lowrank_compress.model.blueprint import blueprint
from lowrank_compress.model.checkpoint import Checkpoint
from lowrank_compress.model.shards import COMPANIONS, INDEX, SINGLE
from tests.tiny import save_tiny


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A checkpoint directory with a config and nothing else."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    return tmp_path


def shards(path: Path) -> None:
    """Two tensors in two shards."""
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    save_file({"a": torch.ones(2, 3)}, path / names[0])
    save_file({"b": torch.zeros(4, dtype=torch.bfloat16)}, path / names[1])
    index = {"metadata": {}, "weight_map": {"a": names[0], "b": names[1]}}
    (path / INDEX).write_text(json.dumps(index))


# --- Its config


def test_a_directory_without_config(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"has no config\.json, nor anything else; expected a Hugging Face checkpoint"
    ):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "cannot be read as JSON"), ("[1]", "holds a JSON list; expected an object"), ("", "cannot be read as JSON")],
)
def test_a_config_that_is_no_json_object(text: str, message: str, path: Path) -> None:
    (path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        _ = Checkpoint(path).raw_config


def test_a_config_that_transformers_cannot_read(path: Path) -> None:
    save_file({"a": torch.ones(2, 3)}, path / SINGLE)
    (path / "config.json").write_text(json.dumps({"model_type": "llama", "layer_types": "all"}))
    with pytest.raises(CheckpointError, match=r"transformers cannot read .*config\.json \(model_type 'llama'"):
        _ = Checkpoint(path).config


@pytest.mark.parametrize(
    ("config", "message"),
    [({"model_type": "lama"}, r"'lama'\. Known: .*\bllama, "), ({}, "'None'")],
)
def test_a_model_type_that_nobody_knows(config: dict[str, object], message: str, path: Path) -> None:
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match=f"Unknown model type {message}"):
        _ = Checkpoint(path).config


def test_labels_of_a_classifier(path: Path) -> None:
    save_file({"a": torch.ones(2, 3)}, path / SINGLE)
    labels = {"id2label": {"0": "bad", "1": "good", "2": "so-so"}, "label2id": {"bad": 0, "good": 1, "so-so": 2}}
    (path / "config.json").write_text(json.dumps({"model_type": "bert", **labels}))
    assert Checkpoint(path).class_ids == {"bad": 0, "good": 1, "so-so": 2}


# --- Its files


def test_one_file(path: Path) -> None:
    save_file({"a": torch.ones(2, 3), "b": torch.zeros(4)}, path / SINGLE)
    assert Checkpoint(path).files == {"a": path / SINGLE, "b": path / SINGLE}
    # Where both are there, the single file counts, as it does for transformers.
    shards(path)
    assert {file.name for file in Checkpoint(path).files.values()} == {SINGLE}


def test_shards(path: Path) -> None:
    shards(path)
    checkpoint = Checkpoint(path)
    assert checkpoint.files == {
        "a": path / "model-00001-of-00002.safetensors",
        "b": path / "model-00002-of-00002.safetensors",
    }
    assert torch.equal(checkpoint.read("a"), torch.ones(2, 3))
    assert checkpoint.read("b").dtype == torch.bfloat16


def test_a_missing_shard_is_named(path: Path) -> None:
    shards(path)
    (path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match=rf"model-00002-of-00002\.safetensors is missing, though {INDEX} names it"
    ):
        _ = Checkpoint(path).files


@pytest.mark.parametrize("keep", [0, 5, 60, -1])
def test_a_truncated_file_is_named(keep: int, path: Path) -> None:
    save_file({"a": torch.ones(20, 3)}, path / SINGLE)
    (path / SINGLE).write_bytes((path / SINGLE).read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not a whole safetensors file .* truncated"):
        _ = Checkpoint(path).files


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt"])
def test_pickles_are_never_read(name: str, path: Path) -> None:
    (path / name).write_bytes(b"not even a pickle")
    with pytest.raises(CheckpointError, match=rf"has pickled weights only \({name}\).* `save_pretrained` it"):
        _ = Checkpoint(path).files
    save_file({"a": torch.ones(2)}, path / SINGLE)
    assert set(Checkpoint(path).files) == {"a"}


def test_a_checkpoint_without_weights(path: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"has no weights; expected {SINGLE} or shards with {INDEX}"):
        _ = Checkpoint(path).files


# --- Its tensors


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool],
    ids=str,
)
def test_sizes_come_from_the_header(dtype: torch.dtype, path: Path) -> None:
    tensor = torch.ones(3, 5).to(dtype)
    save_file({"a": tensor, "empty": torch.empty(0, dtype=dtype), "scalar": torch.tensor(1).to(dtype)}, path / SINGLE)
    checkpoint = Checkpoint(path)
    assert checkpoint.stored("a") == ((3, 5), 15 * dtype.itemsize)
    assert checkpoint.stored("empty") == ((0,), 0)
    assert checkpoint.stored("scalar") == ((), dtype.itemsize)
    assert torch.equal(checkpoint.read("a"), tensor)


def test_tensors_are_read_ahead_where_they_lie(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards(path)
    asked: list[bytes] = []

    def advise(descriptor: int, offset: int, length: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_WILLNEED
        asked.append(os.pread(descriptor, length, offset))

    monkeypatch.setattr(os, "posix_fadvise", advise)
    Checkpoint(path).read_ahead(["b", "a"])
    assert asked == [np.ones(6, dtype=np.float32).tobytes(), bytes(8)]
    monkeypatch.delattr(os, "posix_fadvise")  # as on macOS
    Checkpoint(path).read_ahead(["a"])
    assert len(asked) == 2


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_tensor_that_is_not_finite(bad: float, path: Path) -> None:
    tensor = torch.ones(3, 5)
    tensor[1, 2:4] = bad
    save_file({"good": torch.ones(2), "bad": tensor}, path / SINGLE)
    checkpoint = Checkpoint(path)
    assert torch.equal(checkpoint.read("good"), torch.ones(2))
    with pytest.raises(CheckpointError, match=r"The tensor bad of .* has 2 NaN or infinite elements of 15"):
        checkpoint.read("bad")


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_the_dtype_is_what_the_config_says(key: str, path: Path) -> None:
    save_file({"a": torch.ones(20), "b": torch.ones(3, dtype=torch.float16)}, path / SINGLE)
    assert Checkpoint(path).dtype == torch.float32
    (path / "config.json").write_text(json.dumps({"model_type": "llama", key: "bfloat16"}))
    assert Checkpoint(path).dtype == torch.bfloat16
    (path / "config.json").write_text(json.dumps({"model_type": "llama", key: None}))
    assert Checkpoint(path).dtype == torch.float32


def test_what_belongs_to_a_checkpoint(tmp_path: Path) -> None:
    path = save_tiny("gpt2", tmp_path, max_shard_size="40KB")
    (path / "README.md").write_text("not part of it")
    (path / "training_args.bin").write_bytes(b"")
    checkpoint = Checkpoint(path)
    names = set(checkpoint.identity())
    files = {file.name for file in path.iterdir()}
    assert len(files & names) == len(names)
    assert files - names == {"README.md", "training_args.bin", INDEX}
    assert {file.name for file in checkpoint.companions()} == files & set(COMPANIONS)
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= names


def test_a_blueprint_is_built_once_for_a_checkpoint_and_anew_for_another(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    checkpoint = Checkpoint(tmp_path)
    assert blueprint(checkpoint) is blueprint(checkpoint)
    assert blueprint(Checkpoint(tmp_path)) is not blueprint(checkpoint)
    own = blueprint(checkpoint, torch.float64)
    assert own is not blueprint(checkpoint, torch.float64)
    assert own.model.dtype == torch.float64 != blueprint(checkpoint).model.dtype
