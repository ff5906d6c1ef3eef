"""What MODEL names: directories, files, repositories, and what to do about those that are no checkpoint."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import save_file

from lowrank_compress.errors import CheckpointError, InputError, LrcError, UnsupportedError
from lowrank_compress.model.blueprint import blueprint
from lowrank_compress.model.checkpoint import Checkpoint
from lowrank_compress.model.locate import download, locate
from lowrank_compress.model.shards import INDEX, SINGLE
from tests.runs import Tiny, done, refused
from tests.tiny import save_tiny

# --- Directories and files


def test_a_directory_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert locate(str(tmp_path)) == tmp_path
    assert locate(f"{tmp_path}/") == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "models").mkdir()
    assert locate("~/models") == tmp_path / "models"


@pytest.mark.parametrize("name", ["./nothing", "/nothing/here", "~/nothing", "a/b/c", "a/"])
def test_a_directory_that_is_not_there(name: str) -> None:
    with pytest.raises(InputError, match=f"The directory {name} does not exist"):
        locate(name)


@pytest.mark.parametrize("name", ["", " ", "x" * 5000, "a\0b", "~nobody-of-this-name/x", "/" + "x/" * 3000, "\ud800"])
def test_names_that_cannot_be(name: str) -> None:
    with pytest.raises(InputError):
        locate(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (SINGLE, "is a file; .* Pass the directory that holds it"),
        ("pytorch_model.bin", "is a file; .* Pass the directory that holds it"),
        ("m.Q4_K_M.gguf", "is a file; .* GGUF files are quantized or converted: pass the original checkpoint"),
    ],
)
def test_files(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(InputError, match=message):
        locate(str(tmp_path / name))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "has no config.json, nor anything else"),
        (["m.Q4_K_M.gguf"], r"It has weights for GGUF \(m.Q4_K_M.gguf\): pass the checkpoint that they were"),
        (["onnx/model.onnx"], r"It has weights for ONNX \(onnx/model.onnx\)"),
        (["pytorch_model.bin"], r"It has pickled weights \(pytorch_model.bin\)"),
        (["model_index.json", "unet/config.json"], r"is a diffusers pipeline \(model_index.json\)"),
        (
            ["modules.json", "0_Transformer/config.json"],
            "is a sentence-transformers model .*/0_Transformer has",
        ),
        (["params.json", "consolidated.00.pth"], "is in the format of the model's authors"),
        (
            ["run.json", "recipe.yaml", "model/config.json"],
            "is a run of this .* checkpoint is .*/model;",
        ),
        (["adapter_model.safetensors"], "has adapter weights without adapter_config.json"),
        (["notes.txt", "a", "b", "c"], r"has no config.json; expected .* It has a, b, c, …"),
    ],
)
def test_directories_that_are_no_checkpoint(files: list[str], message: str, tmp_path: Path) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(locate(str(tmp_path)))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "has no weights; expected model.safetensors or shards"),
        (["pytorch_model.bin"], r"has pickled weights only \(pytorch_model.bin\)"),
        (["m.gguf"], r"has weights for GGUF \(m.gguf\) only"),
        (["onnx/model.onnx"], r"has weights for ONNX \(onnx/model.onnx\) only"),
        (["tf_model.h5"], r"has weights for TensorFlow \(tf_model.h5\) only"),
        (["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"], "download the index too"),
        (["shard-00000-model-00001-of-00002.safetensors"], "is a checkpoint of distributed training"),
    ],
)
def test_a_config_without_weights(files: list[str], message: str, tiny: Tiny, tmp_path: Path) -> None:
    model = shutil.copytree(tiny.model, tmp_path / "model")
    (model / SINGLE).unlink()
    for name in files:
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_bytes(b"")
    with pytest.raises(CheckpointError, match=message):
        blueprint(Checkpoint(model))


def test_commands_name_a_run(pristine: Callable[[str], Path], tiny: Tiny, tmp_path: Path) -> None:
    run = pristine("svd")
    message = refused("compress", run, *tiny.options(tmp_path / "run", "svd")[1:])
    assert (
        f"is a run of this program, and has no config.json at its top. Its compressed checkpoint is {run}/model"
        in message
    )


# --- Code that a checkpoint brings

MODULE = """
from transformers import LlamaConfig, LlamaForCausalLM
from pathlib import Path

Path(__file__)  # what runs leaves a trace below
open({trace!r}, "a").close()


class OwnConfig(LlamaConfig):
    model_type = {kind!r}


class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


def own(tiny: Tiny, place: Path, kind: str, **auto_map: str) -> tuple[Path, Path]:
    """A checkpoint with code of its own, and the file that appears when that runs."""
    model, trace = shutil.copytree(tiny.model, place / f"own-{kind}"), place / "ran"
    (model / "own.py").write_text(MODULE.format(trace=str(trace), kind=kind))
    settings = json.loads((model / "config.json").read_text()) | {"model_type": kind, "auto_map": auto_map}
    (model / "config.json").write_text(json.dumps(settings))
    return model, trace


BOTH = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}


def test_code_of_an_unknown_kind(tiny: Tiny, tmp_path: Path) -> None:
    model, trace = own(tiny, tmp_path, "llama-of-tomorrow", **BOTH)
    options = tiny.options(tmp_path / "run", "svd")[1:]
    message = refused("compress", model, *options)
    assert "brings its own code for the model type 'llama-of-tomorrow'" in message
    assert "pass --trust-remote-code if it may run" in message
    assert not trace.exists()
    message = refused("compress", model, *options, "--trust-remote-code")
    assert "Unknown model type 'llama-of-tomorrow'" in message
    assert re.search(r"Known: .*\bbert, ", message)
    assert trace.exists()


def test_code_that_is_not_needed(tiny: Tiny, tmp_path: Path) -> None:
    """transformers has the kind itself, and takes its own class unless the code is trusted."""
    model, trace = own(tiny, tmp_path, "llama", **BOTH)
    options = tiny.options(tmp_path / "run", "svd")[1:]
    message = refused("compress", model, *options, "--trust-remote-code")
    assert "brings its own model class (AutoModelForCausalLM in auto_map) for 'llama'" in message
    assert "Leave that option out" in message
    done("compress", model, *options)
    assert not trace.exists()
    settings = json.loads((tmp_path / "run/model/config.json").read_text())
    assert "own" not in json.dumps(settings["auto_map"])


CODE = [3, [], "own.OwnConfig", {"AutoConfig": 3}, {"AutoConfig": "gone.Gone"}, {"AutoConfig": "../x.Y"}]


@pytest.mark.parametrize("auto_map", CODE)
@pytest.mark.parametrize("trust", [False, True])
def test_malformed_code_entries(auto_map: object, trust: bool, tiny: Tiny, tmp_path: Path) -> None:
    model, _ = own(tiny, tmp_path, "llama-of-tomorrow")
    settings = json.loads((model / "config.json").read_text()) | {"auto_map": auto_map}
    (model / "config.json").write_text(json.dumps(settings))
    with pytest.raises(LrcError):
        blueprint(Checkpoint(model, trust))


def test_trusted_code_is_part_of_what_a_checkpoint_is(tiny: Tiny, tmp_path: Path) -> None:
    model, _ = own(tiny, tmp_path, "llama")
    assert "own.py" not in Checkpoint(model).identity()
    assert Checkpoint(model, True).identity()["own.py"] == model / "own.py"


# --- Repositories of the hub


class Hub:
    """A repository on disk, and what was downloaded of it."""

    def __init__(self, source: Path, cache: Path) -> None:
        self.source, self.cache = source, cache / "snapshots" / "abc123"
        self.revisions: list[str | None] = []

    def names(self) -> list[str]:
        return sorted(str(path.relative_to(self.source)) for path in self.source.rglob("*") if path.is_file())

    def listing(self, name: str, revision: str | None = None) -> list[str]:
        assert name == "owner/name"
        return self.names()

    def snapshot(self, name: str, revision: str | None, allow_patterns: list[str]) -> str:
        assert name == "owner/name"
        self.revisions.append(revision)
        self.cache.mkdir(parents=True, exist_ok=True)
        for file in self.names():
            if any(fnmatch(file, pattern) for pattern in allow_patterns):
                (self.cache / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(self.source / file, self.cache / file)
        return str(self.cache)

    def download(self, trust: bool = False) -> Path:
        return download("owner/name", "v2", trust, self.snapshot, self.listing)

    def had(self) -> set[str]:
        return {str(path.relative_to(self.cache)) for path in self.cache.rglob("*") if path.is_file()}


OTHERS = (
    "consolidated.safetensors", "onnx/model.onnx", "model.fp16.safetensors", "model.fp16.safetensors.index.json",
    "original/consolidated.00.pth", "pytorch_model.bin", "tf_model.h5", "m.gguf", "README.md", "own.py",
    "unrelated.safetensors", "nested/config.json", "training_args.bin",
)  # fmt: skip


@pytest.fixture
def hub(tmp_path: Path) -> Hub:
    """A repository with a sharded checkpoint, and much beside it that nobody reads."""
    source = save_tiny("llama", tmp_path / "source", max_shard_size="30KB")
    for name in OTHERS:
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_bytes(b"x")
    return Hub(source, tmp_path / "cache")


def test_only_what_is_read_is_downloaded(hub: Hub) -> None:
    path = hub.download()
    shards = {name for name in hub.names() if name.startswith("model-")}
    assert len(shards) > 2
    tokenizer = {"tokenizer.json", "tokenizer_config.json"}
    assert hub.had() == shards | tokenizer | {"config.json", INDEX, "generation_config.json"}
    # The first answer says which state of the repository everything else is taken from.
    assert hub.revisions == ["v2", "abc123", "abc123"]
    assert blueprint(Checkpoint(path)).read("model.norm.weight").shape == (32,)


def test_code_is_downloaded_where_it_is_trusted(hub: Hub) -> None:
    assert "own.py" in {path.name for path in hub.download(trust=True).iterdir()}


def test_a_single_file_of_a_repository_counts_before_an_index(hub: Hub) -> None:
    save_file({"a": torch.ones(1)}, hub.source / SINGLE)
    hub.download()
    assert {name for name in hub.had() if name.endswith(".safetensors")} == {SINGLE}


def test_an_adapter_of_a_repository(hub: Hub) -> None:
    for path in hub.source.glob("*.*"):
        path.unlink()
    (hub.source / "adapter_config.json").write_text("{}")
    for name in ("adapter_model.safetensors", "adapter_model.bin", "optimizer.pt"):
        (hub.source / name).write_bytes(b"")
    hub.download()
    assert hub.had() == {"adapter_config.json", "adapter_model.safetensors"}


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ("config.json", "The repository owner/name .* has no config.json"),
        (
            "*.safetensors*",
            r"owner/name has pickled weights only \(pytorch_model.bin, training_args.bin\)",
        ),
        ("model-00001*", "The repository owner/name lacks model-00001-of-"),
    ],
)
def test_repositories_that_are_no_checkpoint(gone: str, message: str, hub: Hub) -> None:
    for path in hub.source.glob(gone):
        path.unlink()
    with pytest.raises(InputError, match=message):
        hub.download()


def test_an_index_of_a_repository_that_leads_elsewhere(hub: Hub) -> None:
    index = {"metadata": {}, "weight_map": {"a": "../../../x.safetensors"}}
    (hub.source / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"expected the name of a \.safetensors file in the same directory"):
        hub.download()


def test_a_repository_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> str:
        raise LocalEntryNotFoundError("no network\nand more lines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(InputError, match=r"'owner/name' is neither a directory here nor .* \(no network\)"):
        locate("owner/name")


def test_a_task_that_is_not_supported_is_named(tiny: Tiny, tmp_path: Path) -> None:
    model = save_tiny("bert", tmp_path / "model", "classification")
    settings = json.loads((model / "config.json").read_text()) | {"architectures": ["BertForMultipleChoice"]}
    (model / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UnsupportedError, match="The checkpoint's head is BertForMultipleChoice; supported are causal"):
        blueprint(Checkpoint(model))
