"""The plugin for vLLM, held against a stub of what it meets there; vLLM itself needs a GPU."""

from __future__ import annotations

import ast
import importlib
import inspect
import sys
import textwrap
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel

from lowrank_compress.shipped.attention import CompressedAttention
from lowrank_compress.shipped.linear import CompressedLinear
from tests import vllm_stub as stub
from tests.runs import Tiny, done

torch.set_num_threads(1)
IDS = torch.tensor([[5, 9, 2, 30, 41, 7, 3, 12]])
FORMS = {
    "pair": ("--method", "svd", "--storage", "pair"),
    "pivot": ("--method", "svd", "--storage", "pivot"),
    "modegpt": ("--method", "modegpt", "--samples", "8", "--seq-len", "32"),
}


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The plugin, registered as vLLM does it."""
    stub.installed(monkeypatch)
    monkeypatch.setattr(stub, "METHODS", {})
    for kind in (CompressedLinear, CompressedAttention):
        monkeypatch.setattr(kind, "load_weights", None, raising=False)  # what register puts there goes with the test
    monkeypatch.delitem(sys.modules, "lowrank_compress.vllm", raising=False)
    EntryPoint("lowrank_compress", "lowrank_compress.vllm:register", "vllm.general_plugins").load()()
    yield importlib.import_module("lowrank_compress.vllm")
    sys.modules.pop("lowrank_compress.vllm", None)


def compressed(form: str, tiny: Tiny, tmp_path: Path) -> Path:
    text = ("--calibration", str(tiny.text)) if form == "modegpt" else ()
    done("compress", tiny.model, "--ratio", "0.2", *FORMS[form], *text, "--out", tmp_path / "run")
    return tmp_path / "run" / "model"


def built(directory: Path) -> tuple[Any, Any]:
    """As the Transformers backend builds a model: from its config, by remote code, parameters on no device."""
    config = AutoConfig.from_pretrained(directory, trust_remote_code=True)
    config._attn_implementation = "vllm"
    with stub.init_on_device_without_buffers("meta"):
        return AutoModel.from_config(config, dtype=torch.float32, trust_remote_code=True), config


@pytest.mark.parametrize("form", FORMS)
def test_serves_what_transformers_computes(form: str, plugin: Any, tiny: Tiny, tmp_path: Path) -> None:
    directory = compressed(form, tiny, tmp_path)
    model, config = built(directory)
    serving = stub.METHODS["lowrank"].from_config(config.quantization_config)
    assert serving.get_name() == "lowrank"
    stub.served(model, config, serving)
    stored = load_file(directory / "model.safetensors")
    weights = [(name.removeprefix("model."), tensor) for name, tensor in stored.items() if name.startswith("model.")]
    # In several parts, as shards come; one cuts a module in two.
    loader, middle = (
        stub.AutoWeightsLoader(model),
        next(i for i, (name, _) in enumerate(weights) if "layers.1.mlp" in name),
    )
    loaded = loader.load_weights(weights[: middle + 1]) | loader.load_weights(weights[middle + 1 :])
    assert loaded == {name for name, _ in weights}
    for layer in model.modules():
        if isinstance(layer, CompressedLinear):
            assert isinstance(layer.lr_in, stub.LinearBase)
            assert (layer._order is not None) == layer._ordered
        assert not any(buffer.device.type == "meta" for buffer in layer.buffers(recurse=False))
    native = AutoModel.from_pretrained(directory)
    with torch.no_grad():
        expected = native(input_ids=IDS, use_cache=False).last_hidden_state
        places = torch.arange(IDS.shape[1])[None]
        found = model.eval()(input_ids=IDS, position_ids=places, use_cache=False, return_dict=False)[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_several_devices_are_refused(plugin: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stub, "devices", 2)
    with pytest.raises(ValueError, match="on several by pipeline parallelism; got tensor parallelism over 2"):
        stub.METHODS["lowrank"].from_config({"quant_method": "lowrank", "version": 2})


@pytest.mark.parametrize("form", ["pair", "modegpt"])
def test_a_model_that_another_built_is_refused(form: str, plugin: Any, tiny: Tiny, tmp_path: Path) -> None:
    """By vLLM's own classes, or without remote code: nothing there would take the factors."""
    directory = compressed(form, tiny, tmp_path)
    config = AutoConfig.from_pretrained(directory)
    serving = stub.METHODS["lowrank"].from_config(config.quantization_config)
    config.quantization_config = None
    with torch.device("meta"):
        stock = AutoModel.from_config(config)
    with pytest.raises(ValueError, match=r"is compressed in the checkpoint, but not .* --model-impl transformers"):
        stub.served(stock, config, serving)
    # vLLM's own classes join projections, and say so.
    serving.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.qkv_proj is compressed in the checkpoint"):
        stub.LinearBase(32, 64, quant_config=serving, prefix="model.layers.0.self_attn.qkv_proj")


def test_the_attention_is_found_in_its_source() -> None:
    """vLLM looks for one call of what is looked up in ALL_ATTENTION_FUNCTIONS, and reads its scale from there."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(CompressedAttention.forward)))
    looked_up = {
        node.targets[0].id
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and isinstance(node.value, ast.Subscript)
        and isinstance(node.value.value, ast.Name)
        and node.value.value.id == "ALL_ATTENTION_FUNCTIONS"
    }
    calls = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in looked_up
    ]
    assert len(calls) == 1
    assert [ast.unparse(word.value) for word in calls[0].keywords if word.arg == "scaling"] == ["self.scaling"]
