"""`lrc compare`: what it says of two models, and what it refuses."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lowrank_compress
from tests.cli.test_evaluate import TASK
from tests.cli.test_texts import table
from tests.runs import Tiny, contents, done, refused
from tests.tiny import save_tiny, tiny_tokenizer

Finished = Callable[[str], Path]


def test_a_run_and_its_original_on_a_text(tiny: Tiny, finished: Finished) -> None:
    run = finished("auto")
    before = contents(run)
    asked = ("--perplexity", tiny.heldout, "--seq-len", 32)
    found = done("compare", tiny.model, run, *asked, "--json").json
    assert (found["a"], found["b"]) == (str(tiny.model), str(run))
    values = found["texts"][str(tiny.heldout)]
    measured = done("eval", run, *asked, "--json").json["perplexity"][str(tiny.heldout)]
    assert values["perplexity"]["a"] == pytest.approx(measured["dense"], rel=1e-6)
    assert values["perplexity"]["b"] == pytest.approx(measured["compressed"], rel=1e-6)
    assert values["tokens"] == measured["tokens"]
    assert values["difference"]["low"] < values["difference"]["value"] < values["difference"]["high"]
    assert values["ratio"]["value"] == pytest.approx(measured["compressed"] / measured["dense"], rel=1e-6)
    assert values["ratio"]["high"] == pytest.approx(math.exp(values["difference"]["high"]))
    assert [block["block"] for block in values["blocks"]] == [0, 1]
    assert values["blocks"][1]["error"] > values["blocks"][0]["error"] > 0 == values["embedding"]["error"]
    shutil.rmtree(run / "eval")
    assert contents(run) == before
    called = lowrank_compress.compare(tiny.model, run, perplexity=tiny.heldout, seq_len=32)
    assert called == found
    other = done("compare", run, tiny.model, *asked, "--json").json["texts"][str(tiny.heldout)]
    assert other["difference"]["value"] == pytest.approx(-values["difference"]["value"])
    assert other["divergence"] != pytest.approx(values["divergence"])


def test_people_see_tables(tiny: Tiny, pristine: Finished, tmp_path: Path) -> None:
    run, other = pristine("svd"), pristine("auto")
    said = done("compare", run, other, "--perplexity", tiny.heldout, "--limit", 1, "--prompt", "the quick brown")
    assert f"A: {run}" in said.out
    assert "heldout.txt (159 tokens in 1 windows)" in said.out
    assert "one window: no interval" in said.out
    assert "Hidden states that leave each block" in said.out
    assert "the quick brown … (" in said.out
    more = done("compare", run, run, "--perplexity", tiny.heldout, "--seq-len", 32)
    assert "95 % interval: 1 to 1" in more.out


def test_tasks_are_tested_question_by_question(tiny: Tiny, pristine: Finished, tmp_path: Path) -> None:
    rows = [{"query": f"the {word}", "choices": [" fox", " dog"], "gold": i % 2} for i, word in enumerate("abcdefgh")]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    (tmp_path / "tiny_choice.yaml").write_text(TASK.format(data=tmp_path / "data.jsonl"))
    asked = ("compare", tiny.model, pristine("svd"), "--tasks", "tiny_choice", "--include-path", tmp_path)
    values = done(*asked, "--json").json["tasks"]["tiny_choice"]["acc"]
    right = []
    for path in (tiny.model, pristine("svd") / "model"):
        model, tokenizer = AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)
        answers = []
        for row in rows:
            scores = []
            for choice in row["choices"]:
                ids = torch.tensor([tokenizer(row["query"] + choice)["input_ids"]])
                start = len(tokenizer(row["query"])["input_ids"])
                with torch.no_grad():
                    logs = model(ids).logits.double().log_softmax(-1)[0, start - 1 : -1]
                scores.append(float(logs.gather(1, ids[0, start:, None]).sum()))
            answers.append(scores.index(max(scores)) == row["gold"])
        right.append(answers)
    pairs = list(zip(*right, strict=True))
    assert values["n"] == 8
    assert (values["a"], values["b"]) == (sum(right[0]) / 8, sum(right[1]) / 8)
    test = values["test"]
    assert (test["only_a"], test["only_b"]) == (pairs.count((True, False)), pairs.count((False, True)))
    assert "tiny_choice · acc" in done(*asked).out


def test_prompts_are_continued_greedily(tiny: Tiny, pristine: Finished) -> None:
    prompts = ["the quick", "a dog"]
    asked = [word for prompt in prompts for word in ("--prompt", prompt)]
    found = done("compare", tiny.model, pristine("svd"), *asked, "--new-tokens", 6, "--json").json["generations"]
    assert [made["prompt"] for made in found] == prompts
    tokenizer = AutoTokenizer.from_pretrained(tiny.model)
    for side, path in (("a", tiny.model), ("b", pristine("svd") / "model")):
        model = AutoModelForCausalLM.from_pretrained(path).eval()
        for made in found:
            ids = tokenizer(made["prompt"])["input_ids"]
            start = len(ids)
            while len(ids) < start + 6 and (len(ids) == start or ids[-1] != tokenizer.eos_token_id):
                with torch.no_grad():
                    ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
            assert made[side] == tokenizer.decode(ids[start:], skip_special_tokens=True)
            assert made["tokens"][side] == len(ids) - start


def test_classifiers(tmp_path: Path) -> None:
    one, other = (save_tiny("bert", tmp_path / f"{seed}", "classification", seed=seed) for seed in (0, 1))
    data = table(tmp_path / "a.tsv", 12)
    asked = ("compare", one, other, "--classification", data, "--label-column", "label")
    values = done(*asked, "--json").json["classification"][str(data)]
    for side, path in (("a", one), ("b", other)):
        alone = done("eval", path, *asked[3:], "--json").json["classification"][str(data)]
        assert values["accuracy"][side] == alone["dense"]
    assert values["n"] == 12
    gap = round(12 * (values["accuracy"]["a"] - values["accuracy"]["b"]))
    assert values["test"]["only_a"] - values["test"]["only_b"] == gap
    assert "McNemar's p" in done(*asked).out
    message = refused("compare", one, other, "--perplexity", data)
    assert "need causal language models; for classifiers use --classification" in message


def test_what_cannot_be_compared(tiny: Tiny, pristine: Finished, tmp_path: Path) -> None:
    text = ("--perplexity", tiny.heldout)
    assert "There is nothing to compare on. Pass --perplexity" in refused("compare", tiny.model, tiny.model)
    other = save_tiny("gpt2", tmp_path / "gpt2")
    assert "are of different families: llama and gpt2" in refused("compare", tiny.model, other, *text)
    deeper = save_tiny("llama", tmp_path / "deeper", num_hidden_layers=3)
    assert "have different numbers of blocks: 2 and 3" in refused("compare", tiny.model, deeper, *text)
    wider = save_tiny("llama", tmp_path / "wider", hidden_size=48)
    assert "hidden states of different widths: 32 and 48" in refused("compare", tiny.model, wider, *text)
    larger = save_tiny("llama", tmp_path / "larger", vocab_size=128)
    assert "vocabularies of different sizes: 96 and 128" in refused("compare", tiny.model, larger, *text)
    fewer = save_tiny("llama", tmp_path / "fewer")
    tiny_tokenizer(fewer, vocab_size=80)
    message = refused("compare", tiny.model, fewer, *text)
    assert "have different tokenizers: the token" in message
    assert "measure each by itself with `lrc eval`" in message
    bare = save_tiny("llama", tmp_path / "bare", bos=False)
    assert "(windows begin with 1 and None)" in refused("compare", tiny.model, bare, *text)
    run = pristine("auto")
    message = refused("compare", tiny.model, run, "--perplexity", tiny.text)
    assert "is the text that this run was calibrated on" in message
    assert "--seq-len 161 is more than the models' 160 positions" in refused(
        "compare", tiny.model, run, *text, "--seq-len", 161
    )
    assert "for language models use --perplexity" in refused(
        "compare", tiny.model, run, "--classification", tiny.heldout
    )
    long = refused("compare", tiny.model, run, "--prompt", "the dog " * 80)
    assert "more than the models' 160 positions" in long
    assert "expected a tokenizer with a chat template" in refused(
        "compare", tiny.model, run, "--prompt", "the", "--apply-chat-template"
    )
    assert "confidence" in refused("compare", tiny.model, run, *text, "--confidence", 1)
