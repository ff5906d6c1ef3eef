"""Models with other heads: without gradients compressed as the model below the head is, with those of its own loss."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoTokenizer

from lowrank_compress import api
from tests.calibration.test_head_losses import HEADS as WITH_LOSS
from tests.calibration.test_head_losses import written
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


def saved(name: str, place: Path, **more: Any) -> tuple[Path, list[str]]:
    """Write a model with a head, and a text for it."""
    model_type, overrides = HEADS[name]
    torch.manual_seed(0)
    model = getattr(transformers, name)(tiny_config(model_type, "classification", **(overrides | more)))
    model.save_pretrained(place / name)
    tokenizer = tiny_tokenizer(place / name)
    tokenizer.mask_token = "<unk>"
    tokenizer.save_pretrained(place / name)
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


@pytest.mark.parametrize(
    ("name", "columns"),
    [
        ("BertForTokenClassification", "the words in --text-column and a label for each in --label-column"),
        ("BertForQuestionAnswering", "--text-column question --text-column context, and the answer in --label-column"),
        ("LlamaForSequenceClassification", "--text-column chosen --text-column rejected"),
    ],
)
def test_gradients_without_labels_are_refused_by_name(name: str, columns: str, tmp_path: Path) -> None:
    model, data = saved(name, tmp_path)
    for more in (data, []):
        said = refused("compress", model, "--method", "kfac", *more, "--out", tmp_path / "run")
        what = "is of examples" if "Llama" in name else "needs labels"
        assert f"takes gradients of the loss of a {name}, which {what}: pass as --calibration" in said
        assert columns in said
        assert "--method svd-llm" in said
    assert not (tmp_path / "run").exists()
    assert columns in refused("eval", model, "--classification", data[1])


def test_what_there_is_none_of_is_refused(tmp_path: Path) -> None:
    model, data = saved("BertForMaskedLM", tmp_path)
    run = tmp_path / "made"
    done("compress", model, "--method", "svd", "--ratio", "0.2", "--out", run)
    assert "--perplexity" in refused("eval", run, "--classification", data[1], "--label-column", "a")


WORDS = [tiny_text(900, seed=7).split()[start : start + 6] for start in range(0, 96, 6)]
TABLES: dict[str, tuple[list[dict[str, Any]], list[str]]] = {
    "BertForTokenClassification": (
        [{"words": each, "tags": [f"LABEL_{len(word) % 5}" for word in each]} for each in WORDS],
        ["--text-column", "words", "--label-column", "tags"],
    ),
    "BertForQuestionAnswering": (
        [{"question": each[0], "context": " ".join(each[1:]), "answer": each[3]} for each in WORDS],
        ["--text-column", "question", "--text-column", "context", "--label-column", "answer"],
    ),
    "LlamaForSequenceClassification": (
        [{"chosen": " ".join(each), "rejected": " ".join(each[:4])} for each in WORDS],
        ["--text-column", "chosen", "--text-column", "rejected"],
    ),
}


@pytest.mark.parametrize(
    ("name", "method", "count"),
    [
        ("BertForTokenClassification", "kfac", 96),
        ("BertForQuestionAnswering", "fwsvd", 16),
        ("LlamaForSequenceClassification", "auto", 16),
    ],
)
def test_gradients_of_its_own_loss(name: str, method: str, count: int, tmp_path: Path) -> None:
    model, _ = saved(name, tmp_path)
    rows, columns = TABLES[name]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run, options = tmp_path / "run", ["--ratio", "0.3", "--calibration", data, *columns, "--seq-len", "40"]
    done("compress", model, "--method", method, *options, "--out", run)
    assert type(api.load(run)).__name__ == name
    (found,) = (
        done("eval", run, "--classification", data, *columns, "--force", "--json").json["classification"].values()
    )
    assert found["n"] == count
    assert all(0 <= found[role] <= 1 for role in ("dense", "compressed"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fields", "labels"),
    [
        ({"num_labels": 1}, [len(each[0]) / 4 for each in WORDS]),
        ({"num_labels": 2, "problem_type": "regression"}, [[float(len(each[0])), 0.5] for each in WORDS]),
        ({"num_labels": 2, "problem_type": "multi_label_classification"}, [f"{len(each[0]) % 2}" for each in WORDS]),
    ],
)
def test_scores_and_labels_need_texts_alone(fields: dict[str, Any], labels: list[Any], tmp_path: Path) -> None:
    """Gradients are of outputs: a table of texts without labels does."""
    model, data = saved("BertForSequenceClassification", tmp_path, **fields)
    said = refused("compress", model, "--method", "kfac", *data, "--out", tmp_path / "run")
    assert "which is of examples: pass as --calibration a table with --text-column" in said
    rows = [{"text": " ".join(each), "y": label} for each, label in zip(WORDS, labels, strict=True)]
    table = tmp_path / "rows.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run, options = tmp_path / "run", ["--ratio", "0.3", "--calibration", table, "--text-column", "text"]
    done("compress", model, "--method", "auto", *options, "--seq-len", "40", "--out", run)
    assert type(api.load(run)).__name__ == "BertForSequenceClassification"


@pytest.mark.parametrize(
    ("fields", "paired", "unit"),
    [
        ({"num_labels": 1}, False, "½(Δs)² a score"),
        ({"num_labels": 1}, True, "nats a pair"),
        ({"num_labels": 3, "problem_type": "multi_label_classification"}, False, "nats a label"),
        ({"num_labels": 3}, False, "nats an example"),
    ],
)
def test_losses_have_the_unit_of_their_head(fields: dict[str, Any], paired: bool, unit: str, tmp_path: Path) -> None:
    model, _ = saved("BertForSequenceClassification", tmp_path, **fields)
    rows, columns = TABLES["LlamaForSequenceClassification"]
    if not paired:
        rows = [{"text": row["chosen"], "label": str(number % 3)} for number, row in enumerate(rows)]
        columns = ["--text-column", "text", *(["--label-column", "label"] if fields == {"num_labels": 3} else [])]
    table = tmp_path / "rows.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data, run = ["--calibration", table, *columns, "--seq-len", 40], tmp_path / "run"
    done("compress", model, "--method", "kfac", "--ratio", 0.3, *data, "--out", run)
    assert f"loss, {unit}" in done("show", run).out
    assert unit in done("score", run).out
    made = tmp_path / "quantized"
    said = done("quantize", model, "--bits", 4, "--group", 8, *data, "--out", made).out
    assert f" {unit}." in said
    shown = done("show", made).out
    assert f"loss, {unit}" in shown
    assert " nats a token" not in said + shown


def test_a_masked_language_model_needs_no_labels(tmp_path: Path) -> None:
    model, data = saved("BertForMaskedLM", tmp_path)
    run, other = tmp_path / "run", tmp_path / "other.txt"
    other.write_text(tiny_text(700, seed=9))
    done("compress", model, "--method", "auto", "--ratio", "0.3", *data, "--out", run)
    found = done("eval", run, "--perplexity", other, "--seq-len", "20", "--json").json["perplexity"][str(other)]
    tokens = len(AutoTokenizer.from_pretrained(model)(other.read_text(), add_special_tokens=False)["input_ids"])
    assert found["tokens"] == tokens
    assert 1 < found["dense"] < found["compressed"] * 1.5


def test_a_masked_language_model_without_a_mask_is_refused(tmp_path: Path) -> None:
    model, data = saved("BertForMaskedLM", tmp_path)
    tiny_tokenizer(model)
    assert "has no mask token" in refused("compress", model, "--method", "svd-llm", *data, "--out", tmp_path / "run")


@pytest.mark.parametrize("name", WITH_LOSS)
def test_training_makes_it_more_like_the_dense_one(name: str, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(tiny_text(3000))
    model, _ = written(name, tmp_path / "model")
    run, steps = tmp_path / "run", ["--steps", "6", "--lr", "0.0003", "--seq-len", "40"]
    data, columns = ["--calibration", str(tmp_path / "text.txt")], list[str]()
    done("compress", model, "--method", "svd", "--ratio", "0.3", "--out", run)
    if "Masked" not in name:
        said = refused("recover", run, *data, *steps)
        assert f"A {name} is trained on examples, and not on running text" in said
        kind = "LlamaForSequenceClassification" if "Sequence" in name else name.replace("Roberta", "Bert")
        rows, columns = TABLES[kind]
        table = tmp_path / "rows.jsonl"
        table.write_text("".join(json.dumps(row) + "\n" for row in rows))
        data = ["--calibration", str(table)]
    found = done("recover", run, *data, *columns, *steps, "--json").json["recover"]
    assert found["loss_after"] < found["loss_before"]
    if name == "RobertaForQuestionAnswering":
        unlabelled = ["--text", data[1], *columns[:4], *steps, "--out", tmp_path / "b"]
        assert f"--text trains a {name} on labels, and the data have none" in refused("recover", run, *unlabelled)
