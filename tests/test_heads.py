"""Heads that no loss is known for here: compressed by methods without gradients, as the model below the head is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from lowrank_compress import api
from tests.runs import done, refused
from tests.tiny import tiny_config, tiny_text, tiny_tokenizer

IDS = torch.tensor([[5, 9, 2, 30, 41, 7, 3, 12], [11, 4, 8, 8, 60, 23, 90, 5]])
HEADS: dict[str, tuple[str, dict[str, Any]]] = {
    "BertForTokenClassification": ("bert", {"num_labels": 5}),
    "BertForQuestionAnswering": ("bert", {"num_labels": 2}),
    "BertForMaskedLM": ("bert", {}),
    "BertForSequenceClassification": ("bert", {"num_labels": 1}),
    "LlamaForSequenceClassification": ("llama", {"num_labels": 1}),
}


def saved(name: str, place: Path) -> tuple[Path, list[str]]:
    """Write a model with a head, and a text for it."""
    model_type, overrides = HEADS[name]
    torch.manual_seed(0)
    model = getattr(transformers, name)(tiny_config(model_type, "classification", **overrides))
    model.save_pretrained(place / name)
    tiny_tokenizer(place / name)
    (place / "text.txt").write_text(tiny_text(3000))
    return place / name, ["--calibration", str(place / "text.txt"), "--samples", "24", "--seq-len", "24"]


@pytest.mark.parametrize("name", HEADS)
def test_without_gradients_it_is_compressed_as_without_its_head(name: str, tmp_path: Path) -> None:
    model, data = saved(name, tmp_path)
    run, base = tmp_path / "run", tmp_path / "base"
    done("compress", model, "--method", "svd-llm", "--ratio", "0.2", *data, "--out", run)
    loaded: Any = api.load(run)
    assert type(loaded).__name__ == name
    found, info = type(loaded).from_pretrained(run / "model", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        assert all(torch.isfinite(value).all() for value in found(input_ids=IDS).values() if torch.is_tensor(value))

    # Without data, what is below the head comes out the same where there is none.
    done("compress", model, "--method", "svd", "--ratio", "0.2", "--out", run, "--overwrite")
    below_head = getattr(transformers, name).from_pretrained(model).base_model
    loaded = type(below_head)(below_head.config)  # a pooler, too
    loaded.load_state_dict(below_head.state_dict(), strict=False)
    loaded.config.architectures = [type(loaded).__name__]
    loaded.save_pretrained(tmp_path / "headless")
    tiny_tokenizer(tmp_path / "headless")
    done("compress", tmp_path / "headless", "--method", "svd", "--ratio", "0.2", "--out", base)
    whole, below = (load_file(path / "model" / "model.safetensors") for path in (run, base))
    prefix = f"{loaded.base_model_prefix}."
    below = {key.removeprefix(prefix): tensor for key, tensor in below.items() if "pooler" not in key}
    inside = {key.removeprefix(prefix): tensor for key, tensor in whole.items()}
    assert any("lr_in" in key for key in below)
    assert all(torch.equal(inside[key], tensor) for key, tensor in below.items())


@pytest.mark.parametrize("name", ["BertForMaskedLM", "LlamaForSequenceClassification"])
def test_gradients_are_refused_by_name(name: str, tmp_path: Path) -> None:
    model, data = saved(name, tmp_path)
    for method in ("kfac", "auto"):
        said = refused("compress", model, "--method", method, *data, "--out", tmp_path / "run")
        assert f"a {name} has no head to give one on plain text. Choose a method without gradients" in said
    assert not (tmp_path / "run").exists()
    run = tmp_path / "made"
    done("compress", model, "--method", "svd", "--ratio", "0.2", "--out", run)
    assert f"not for a {name}" in refused("recover", run, *data[:2], "--seq-len", "24", "--steps", "1")
    for option in ("--perplexity", "--classification"):
        assert "Traceback" not in refused("eval", run, option, data[1], *(["--label-column", "a"] * (option[2] == "c")))
