"""What is damaged in a compressed checkpoint, or too large to be what it says, is refused before any computing."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.runs import Tiny, done, refused
from tests.tiny import save_tiny


@pytest.mark.parametrize("value", [10**6, -1, 1])
@pytest.mark.parametrize(("method", "kind"), [("auto", "lr_index"), ("modegpt", "lr_rotary")])
def test_indices(finished: Callable[[str], Path], tiny: Tiny, method: str, kind: str, value: int):
    model = finished(method) / "model"
    (model / "manifest.json").unlink()
    tensors = load_file(model / "model.safetensors")
    name = next(name for name in sorted(tensors) if kind in name)
    flat = tensors[name].reshape(-1)
    flat[0 if value != 1 else -1] = value if value != 1 else flat[0]
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    moved = model.rename(model.parent.parent / "compressed")
    assert f"{kind} does not name distinct rows" in refused("eval", moved, "--perplexity", tiny.heldout)
    with pytest.raises(ValueError, match=f"{kind} does not name distinct rows"):
        AutoModelForCausalLM.from_pretrained(moved)


def test_a_huge_tokenizer(tiny: Tiny, tmp_path: Path):
    model = tmp_path / "model"
    model.mkdir()
    for path in tiny.model.iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    os.truncate(model / "tokenizer_config.json", 1 << 40)
    assert "1,099,511,627,776 bytes" in refused("eval", model, "--perplexity", tiny.heldout)


def test_spectra_of_an_altered_basis(finished: Callable[[str], Path]):
    run = finished("svd-llm")
    (basis,) = sorted((run / "scores").glob("basis-*0*.safetensors"))[:1]
    os.truncate(basis, 100)
    spectra = done("show", run, "--json").json["spectra"]
    assert spectra.keys() == {name for name in spectra if name.startswith("model.layers.1")}
    assert spectra  # those of the other block


def test_a_head_that_is_tied_and_stored_otherwise(tmp_path: Path):
    model = save_tiny("llama", tmp_path / "tied", tie_word_embeddings=True)
    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 2
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    words = ("compress", model, "--method", "svd", "--out", tmp_path / "run")
    assert "stores different values in model.embed_tokens.weight and lm_head.weight" in refused(*words)


@pytest.mark.slow
def test_the_form_in_which_a_config_wants_results(tiny: Tiny, tmp_path: Path):
    model = tmp_path / "model"
    shutil.copytree(tiny.model, model)
    config = json.loads((model / "config.json").read_text())
    asked = {"return_dict": False, "output_hidden_states": True, "output_attentions": True, "use_cache": True}
    (model / "config.json").write_text(json.dumps(config | asked))
    done("compress", model, *tiny.options(tmp_path / "run")[1:])
    files = [tmp_path / "run/model/model.safetensors", tmp_path / "plain/model/model.safetensors"]
    done("compress", *tiny.options(tmp_path / "plain"))
    assert files[0].read_bytes() == files[1].read_bytes()
