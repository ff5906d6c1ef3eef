"""Models without a head, and directories of sentence-transformers: compressed whole, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel

from lowrank_compress import api
from tests.runs import done, refused
from tests.tiny import tiny_model, tiny_text, tiny_tokenizer

SENTENCES: dict[str, Any] = {
    "modules.json": [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}],
    "config_sentence_transformers.json": {"similarity_fn_name": "cosine"},
    "sentence_bert_config.json": {"max_seq_length": 64},
    "1_Pooling/config.json": {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True},
}
IDS = torch.tensor([[5, 9, 2, 30, 41, 7, 3, 12], [11, 4, 8, 8, 60, 23, 90, 5]])


def saved(place: Path, model_type: str = "bert") -> tuple[Path, list[str]]:
    """Write an embedding model and a text for it."""
    path = place / "dense"
    model: Any = tiny_model(model_type, "lm" if model_type == "llama" else "classification").base_model
    model.config.architectures = [type(model).__name__]
    model.save_pretrained(path)
    tiny_tokenizer(path)
    for name, content in SENTENCES.items():
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text(json.dumps(content))
    text = place / "text.txt"
    text.write_text(tiny_text(3000))
    return path, ["--calibration", str(text), "--samples", "24", "--seq-len", "24"]


def states(path: Path) -> torch.Tensor:
    with torch.no_grad():
        return AutoModel.from_pretrained(path).eval()(input_ids=IDS).last_hidden_state


def has_all(path: Path) -> bool:
    return all(json.loads((path / name).read_text()) == content for name, content in SENTENCES.items())


@pytest.mark.parametrize("model_type", ["bert", "distilbert", "llama"])
def test_without_a_head_with_what_sentence_transformers_needs(model_type: str, tmp_path: Path) -> None:
    model, data = saved(tmp_path, model_type)
    run = tmp_path / "run"
    done("compress", model, "--method", "svd-llm", "--ratio", "0.2", *data, "--out", run)
    assert has_all(run / "model")
    done("verify", run)
    assert type(api.load(run)).__name__ == type(AutoModel.from_pretrained(model)).__name__
    near = states(run / "model")
    assert (near - states(model)).abs().max() > 1e-3
    done("export", run, "--dense", tmp_path / "exported")
    assert has_all(tmp_path / "exported")
    torch.testing.assert_close(states(tmp_path / "exported"), near, rtol=1e-4, atol=1e-4)


def test_replacing_a_run_leaves_nothing_over_and_loses_nothing(tmp_path: Path) -> None:
    model, _ = saved(tmp_path)
    run = tmp_path / "run"
    done("compress", model, "--method", "svd", "--ratio", "0.2", "--out", run)
    (run / "model" / "1_Pooling" / "mine.txt").write_text("mine")
    done("compress", model, "--method", "svd", "--ratio", "0.3", "--out", run, "--overwrite")
    assert [path.read_text() for path in run.rglob("mine*")] == ["mine"]
    assert has_all(run / "model")
    done("cast", run, "--dtype", "bfloat16")
    done("cast", run, "--dtype", "float16", "--overwrite")
    assert has_all(run / "cast")
    assert len(list((run / "cast").rglob("1_Pooling*"))) == 1


@pytest.mark.parametrize("method", ["kfac", "fwsvd"])
def test_gradients_are_refused_by_name(method: str, tmp_path: Path) -> None:
    model, data = saved(tmp_path)
    said = refused("compress", model, "--method", method, *data, "--out", tmp_path / "run")
    assert "a BertModel has no head" in said
    assert "--method svd-llm" in said
    assert not (tmp_path / "run").exists()


def test_pickled_modules_are_refused(tmp_path: Path) -> None:
    model, _ = saved(tmp_path)
    (model / "2_Dense").mkdir()
    (model / "2_Dense" / "pytorch_model.bin").write_bytes(b"")
    said = refused("compress", model, "--method", "svd", "--out", tmp_path / "run")
    assert "2_Dense/pytorch_model.bin is a pickle" in said
