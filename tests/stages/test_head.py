"""What is outside the blocks: the head of a language model, compressed where that is asked for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

from lowrank_compress.formats.table import FORMATS
from tests.runs import Tiny, done, refused
from tests.tiny import save_tiny, tiny_text

HEAD = ("--method", "svd", "--for", "head=svd", "--ratio-of", "model", "--ratio", 0.3, "--samples", 4, "--seq-len", 16)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "heldout.txt"
    path.write_text(tiny_text(2000, seed=1))
    return path


@pytest.mark.parametrize("storage", sorted(FORMATS))
@pytest.mark.parametrize("model_type", ["llama", "gpt_neox"])
def test_a_compressed_head_computes_what_it_stands_for(
    model_type: str, storage: str, text: Path, tmp_path: Path
) -> None:
    model, run = save_tiny(model_type, tmp_path / "model"), tmp_path / "run"
    said = done("compress", model, *HEAD, "--storage", storage, "--out", run, "--json").json
    report = json.loads((run / "model" / "lowrank.json").read_text())
    assert report["matrices"]["lm_head"]["stored"] < report["matrices"]["lm_head"]["dense"]
    on_disk = {"llama": "lm_head", "gpt_neox": "embed_out"}[model_type]
    assert f"{on_disk}.lr_in.weight" in load_file(run / "model" / "model.safetensors")
    assert said["reached_ratio"] >= 0.3

    done("export", run, "--dense", tmp_path / "dense")
    assert load_file(tmp_path / "dense" / "model.safetensors").keys() == load_file(model / "model.safetensors").keys()
    ids = torch.arange(12)[None]
    compressed = AutoModelForCausalLM.from_pretrained(run / "model", dtype=torch.float64)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(compressed(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-5)
    whole = sum(tensor.numel() for tensor in compressed.state_dict().values())
    parameters = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_pretrained(model).parameters())
    assert whole <= 0.7 * parameters

    (found,) = (
        done("eval", run, "--perplexity", text, "--seq-len", 16, "--limit", 8, "--json").json["perplexity"].values()
    )
    (exported,) = (
        done("eval", tmp_path / "dense", "--perplexity", text, "--seq-len", 16, "--limit", 8, "--json")
        .json["perplexity"]
        .values()
    )
    assert found["compressed"] == pytest.approx(exported["dense"], rel=1e-4)
    assert all(entry["state"] in ("intact", "dropped") for entry in done("verify", run, "--json").json["files"])


def test_without_being_asked_the_head_stays(tiny: Tiny, tmp_path: Path) -> None:
    done("compress", *tiny.options(tmp_path / "run", "svd"))
    names = load_file(tmp_path / "run" / "model" / "model.safetensors").keys()
    assert "lm_head.weight" in names


def test_what_cannot_be_is_said(tiny: Tiny, tmp_path: Path) -> None:
    model, out = tiny.model, ("--out", tmp_path / "run")
    assert "Pass --ratio-of model" in refused("compress", model, "--method", "svd", "--for", "head=svd", *out)
    said = refused(
        "compress", model, "--method", "svd", "--for", "head=svd-llm", "--ratio-of", "model",
        "--calibration", tiny.text, *out,
    )  # fmt: skip
    assert "svd-llm needs statistics" in said
    assert "--for head=svd" in said
    tied = save_tiny("llama", tmp_path / "tied", tie_word_embeddings=True)
    assert "shares its weight with the embedding" in refused("compress", tied, *HEAD, *out)
    assert not (tmp_path / "run").exists()


def test_a_head_is_cast_and_its_indices_are_checked(tmp_path: Path) -> None:
    model, run = save_tiny("llama", tmp_path / "model"), tmp_path / "run"
    done("compress", model, *HEAD, "--storage", "pivot", "--out", run)
    done("cast", run, "--dtype", "bfloat16")
    file = run / "cast" / "model.safetensors"
    tensors = load_file(file)
    assert tensors["lm_head.lr_in.weight"].dtype == torch.bfloat16
    assert tensors["lm_head.lr_index"].dtype == torch.int32

    alone = tmp_path / "alone"
    shutil.copytree(run / "model", alone)
    tensors = load_file(alone / "model.safetensors")
    tensors["lm_head.lr_index"][0] = 10_000
    save_file(tensors, alone / "model.safetensors", metadata={"format": "pt"})
    assert "lm_head.lr_index does not name distinct rows" in refused("export", alone, "--dense", tmp_path / "dense")


@pytest.mark.parametrize("model_type", ["llama", "gpt_neox"])
@pytest.mark.parametrize("kind", ["low rank", "few bits"])
def test_a_model_without_it_is_the_base_of_that_which_has_it(model_type: str, kind: str, tmp_path: Path) -> None:
    model, out = save_tiny(model_type, tmp_path / "model"), tmp_path / "out"
    if kind == "low rank":
        done("compress", model, *HEAD, "--out", tmp_path / "run")
        out = tmp_path / "run" / "model"
    else:
        done("quantize", model, "--rounding", "rtn", "--bits", 8, "--head", 8, "--asymmetric", "--out", out)
    ids = torch.arange(4, 20)[None]
    whole = AutoModelForCausalLM.from_pretrained(out).eval()
    base, info = AutoModel.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    expected = whole.base_model(ids).last_hidden_state
    assert torch.equal(base.eval()(ids).last_hidden_state, expected)
    base.save_pretrained(tmp_path / "base")
    again, info = AutoModel.from_pretrained(tmp_path / "base", output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(again.eval()(ids).last_hidden_state, expected)
