"""Texts, tables and classifiers, as commands take them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from tests.runs import Tiny, done, refused
from tests.tiny import save_tiny, tiny_text, tiny_tokenizer


def table(path: Path, rows: int) -> Path:
    """Labelled examples of several lengths."""
    lines = [f"{tiny_text(20 + 7 * (i % 5), i).strip()}".replace("\n", " ") + f"\t{i % 3}" for i in range(rows)]
    path.write_text("\n".join(["text\tlabel", *lines, ""]))
    return path


@pytest.mark.parametrize(
    "overrides",
    [{"num_labels": 1}, {"problem_type": "regression"}, {"problem_type": "multi_label_classification"}],
)
def test_what_does_not_fit_the_outputs_is_refused_by_name(overrides: dict[str, Any], tmp_path: Path) -> None:
    """For what needs their loss, that is; a method without gradients takes them."""
    model = save_tiny("bert", tmp_path / "model", "classification", **overrides)
    data = table(tmp_path / "a.tsv", 6)
    (tmp_path / "a.txt").write_text(tiny_text(900))
    running = ["--method", "fwsvd", "--calibration", tmp_path / "a.txt", "--out", tmp_path / "run"]
    for command in ("compress", "calibrate"):
        said = refused(command, model, *running)
        assert "the loss of a BertForSequenceClassification, which is of examples" in said
    if overrides == {"problem_type": "regression"}:
        said = refused("eval", model, "--classification", data, "--label-column", "label")
        assert "has 1 number in label, and the model gives 3 scores; expected as many" in said
    assert "in --label-column" in refused("eval", model, "--classification", data)
    if overrides != {"num_labels": 1}:
        pairs = ["--text-column", "chosen", "--text-column", "rejected"]
        (tmp_path / "b.jsonl").write_text(json.dumps({"chosen": "the fox", "rejected": "dog"}) + "\n")
        options = ["--method", "svd-llm", "--calibration", tmp_path / "b.jsonl", *pairs, "--out", tmp_path / "other"]
        assert "Preferences are for models with one score" in refused("compress", model, *options)
    assert not (tmp_path / "run").exists()
    done("compress", model, "--method", "svd", "--dry-run")


def test_accuracy_is_that_of_each_example_alone(tmp_path: Path) -> None:
    """Though the tokenizer pads left, with another token than the model's."""
    model = save_tiny("gpt2", tmp_path / "model", "classification", pad_token_id=7)
    tokenizer = tiny_tokenizer(model)
    tokenizer.padding_side = "left"
    tokenizer.save_pretrained(model)
    stock = AutoModelForSequenceClassification.from_pretrained(model).eval()
    lines = []
    for seed in range(60):
        text = tiny_text(10 + 7 * (seed % 9), seed).strip().replace("\n", " ")
        with torch.no_grad():
            lines.append(f"{text}\t{int(stock(torch.tensor([tokenizer(text)['input_ids']])).logits.argmax())}")
    (tmp_path / "a.tsv").write_text("\n".join(["text\tlabel", *lines]))
    columns = ["--text-column", "text", "--label-column", "label"]
    for size in (1, 4, 60):
        said = done("eval", model, "--classification", tmp_path / "a.tsv", *columns, "--batch-size", size, "--json")
        assert said.json["classification"][str(tmp_path / "a.tsv")] == {"dense": 1.0, "n": 60}


def test_fewer_windows_or_examples_than_asked_for_are_told(tiny: Tiny, tmp_path: Path) -> None:
    said = done("compress", *tiny.options(tmp_path / "run", "svd-llm"), "--samples", "5000")
    count = json.loads((tmp_path / "run" / "stats" / "manifest.json").read_text())["report"]["windows"]
    assert 0 < count < 5000
    assert f"The calibration text has {count} windows, fewer than the 5000 asked for; all are taken." in said.text
    model = save_tiny("bert", tmp_path / "model", "classification")
    options = ["--method", "fwsvd", "--calibration", table(tmp_path / "a.tsv", 30), "--label-column", "label"]
    said = done("compress", model, *options, "--samples", "31", "--out", tmp_path / "other")
    assert "The calibration text has 30 examples, fewer than the 31 asked for; all are taken." in said.text
    said = done("compress", model, *options, "--samples", "30", "--out", tmp_path / "third")
    assert "asked for" not in said.text


def test_a_text_counts_the_same_whatever_it_is_kept_in(tiny: Tiny, tmp_path: Path) -> None:
    text = tiny_text(1500, 5)
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "a.json").write_text(json.dumps([{"text": text}], indent=1))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(json.dumps({"text": text}).encode()))
    names = [tmp_path / name for name in ("a.txt", "a.txt.gz", "a.json", "a.jsonl.gz")]
    options = [part for name in names for part in ("--perplexity", name)]
    found = done("eval", tiny.model, *options, "--seq-len", "32", "--json").json["perplexity"]
    assert len(found) == 4
    assert all(each == found[str(names[0])] for each in found.values())


def test_conversations_need_a_chat_template(tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "model")
    chats = [{"messages": [{"role": "user", "content": tiny_text(150, i)}]} for i in range(20)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, chats)))
    options = [model, "--method", "svd-llm", "--calibration", tmp_path / "a.jsonl", "--seq-len", "32", "--samples", "4"]
    assert "has no chat template" in refused("compress", *options, "--out", tmp_path / "run")
    tokenizer = tiny_tokenizer(model)
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(model)
    done("compress", *options, "--out", tmp_path / "run")
    (tmp_path / "a.txt").write_text("".join(chat["messages"][0]["content"] for chat in chats))
    plain = [tmp_path / "a.txt" if part == tmp_path / "a.jsonl" else part for part in options]
    done("compress", *plain, "--out", tmp_path / "plain")
    reports = [
        json.loads((tmp_path / run / "stats" / "manifest.json").read_text())["report"] for run in ("run", "plain")
    ]
    assert reports[0]["tokens_sha256"] == reports[1]["tokens_sha256"]
