"""`lrc compare`: what it says of two models, and what it refuses."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BertForMaskedLM

import lowrank_compress
from tests.cli.test_evaluate import TASK
from tests.cli.test_texts import table
from tests.evaluation.test_exam import HEADS, TEXTS, write_head, write_table
from tests.runs import Tiny, contents, done, refused
from tests.tiny import save_tiny, tiny_config, tiny_text, tiny_tokenizer

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


@pytest.mark.slow
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
        assert values["metrics"]["accuracy"][side] == alone["dense"]
    assert values["n"] == values["examples"] == 12
    accuracy = values["metrics"]["accuracy"]
    gap = round(12 * (accuracy["a"] - accuracy["b"]))
    assert accuracy["test"]["only_a"] - accuracy["test"]["only_b"] == gap
    assert accuracy["difference"]["value"] == pytest.approx(-gap / 12)
    assert "McNemar's p" in done(*asked).out
    for given in (["--perplexity", data], ["--tasks", "piqa"], ["--prompt", "the"]):
        message = refused("compare", one, other, *given)
        assert "need causal language models, and --perplexity needs these or masked ones; of a Bert" in message
        assert "use --classification" in message
    assert "a BertForSequenceClassification has a head; use --classification" in refused(
        "compare", one, other, "--sts", data
    )


def drawn_pearson(scores: list[list[float]], right: list[float], resamples: int) -> list[float]:
    """Bounds of how much higher the second list's correlation is, one draw after the other."""
    generator, gaps = np.random.default_rng(0), []
    for _ in range(resamples):
        drawn = generator.integers(len(right), size=len(right))
        one, other = (np.corrcoef(np.array(side)[drawn], np.array(right)[drawn])[0, 1] for side in scores)
        gaps.append(other - one)
    return np.nanquantile(gaps, [0.025, 0.975]).tolist()


UNITS = {"regression": "½(Δs)² a score", "labels": "nats a label", "chunks": "nats a word", "answers": "nats an answer"}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_other_heads(head: str, tmp_path: Path) -> None:
    """Each measure is that of `lrc eval`; the interval is that of single draws, computed from whole models."""
    models = [write_head(head, tmp_path / side, seed) for seed, side in enumerate("ab")]
    table = write_table(head, tmp_path / "rows.jsonl")
    asked = ("compare", tmp_path / "a", tmp_path / "b", *table, "--batch-size", 3, "--resamples", 200)
    (values,) = done(*asked, "--json").json["classification"].values()
    assert list(values["metrics"]) == [*HEADS[head][3][:1], *list(values["metrics"])[1:]]
    for side in "ab":
        (alone,) = done("eval", tmp_path / side, *table, "--json").json["classification"].values()
        assert {name: found[side] for name, found in values["metrics"].items()} == {
            name: pytest.approx(found["dense"]) for name, found in alone["metrics"].items()
        }
        assert values["n"] == alone["n"]
    for found in values["metrics"].values():
        assert found["difference"]["value"] == pytest.approx(found["b"] - found["a"])
        assert found["difference"]["low"] <= found["difference"]["high"]
    assert (values["examples"], values["loss_unit"]) == (8, UNITS[head])
    assert values["loss"]["b"] - values["loss"]["a"] == pytest.approx(values["difference"]["value"])
    tested = {name for name, found in values["metrics"].items() if "test" in found}
    assert tested == {"labels": {"exact_match"}, "answers": {"exact_match"}}.get(head, set())
    said = done(*asked).out
    assert UNITS[head] in said
    assert ("48 words in 8 examples" if head == "chunks" else "8 examples") in said
    assert ("same prediction" in said) == (head != "regression")
    if head == "regression":
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a")
        # In the order in which texts of one length come first, as examples are drawn.
        lengths = [len(tokenizer(text)["input_ids"]) for text in TEXTS]
        order = sorted(range(8), key=lambda row: (lengths.index(lengths[row]), row))
        right = [HEADS[head][2][row] for row in order]
        with torch.no_grad():
            scores = [
                [float(model.eval()(**tokenizer(TEXTS[row], return_tensors="pt")).logits) for row in order]
                for model in models
            ]
        found = values["metrics"]["pearson"]["difference"]
        assert [found["low"], found["high"]] == pytest.approx(drawn_pearson(scores, right, 200), abs=1e-3)
        halved = [sum((one - other) ** 2 for one, other in zip(side, right, strict=True)) / 16 for side in scores]
        assert values["loss"] == {"a": pytest.approx(halved[0], rel=1e-4), "b": pytest.approx(halved[1], rel=1e-4)}


def test_preferences(tmp_path: Path) -> None:
    """Their loss is in nats, unlike that of other scores; pairs are drawn, and only one may be right about one."""
    models = [write_head("regression", tmp_path / side, seed) for seed, side in enumerate("ab")]
    rows = [{"chosen": one, "rejected": other[:9]} for one, other in pairwise(TEXTS)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = ("--text-column", "chosen", "--text-column", "rejected")
    asked = ("--classification", tmp_path / "pairs.jsonl", *columns)
    (values,) = done("compare", tmp_path / "a", tmp_path / "b", *asked, "--json").json["classification"].values()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a")
    gaps = []
    for model in models:
        with torch.no_grad():
            scores = [
                [float(model.eval()(**tokenizer(row[side], return_tensors="pt")).logits) for row in rows]
                for side in ("chosen", "rejected")
            ]
        gaps.append([one - other for one, other in zip(*scores, strict=True)])
    assert (values["n"], values["loss_unit"]) == (7, "nats a pair")
    for side, own in zip("ab", gaps, strict=True):
        assert values["metrics"]["accuracy"][side] == sum(gap > 0 for gap in own) / 7
        assert values["loss"][side] == pytest.approx(sum(math.log1p(math.exp(-gap)) for gap in own) / 7, rel=1e-5)
    both = list(zip(*gaps, strict=True))
    assert values["metrics"]["accuracy"]["test"]["only_a"] == sum(one > 0 >= other for one, other in both)


def test_masked_language_models(tmp_path: Path) -> None:
    """All readings of a window are drawn together."""
    for seed, side in enumerate("ab"):
        torch.manual_seed(seed)
        BertForMaskedLM(tiny_config("bert", "classification")).save_pretrained(tmp_path / side)
        tokenizer = tiny_tokenizer(tmp_path / side)
        tokenizer.mask_token = "<unk>"
        tokenizer.save_pretrained(tmp_path / side)
    (tmp_path / "text.txt").write_text(tiny_text(400))
    asked = ("--perplexity", tmp_path / "text.txt", "--seq-len", 30, "--batch-size", 4)
    (values,) = done("compare", tmp_path / "a", tmp_path / "b", *asked, "--json").json["texts"].values()
    for side in "ab":
        (alone,) = done("eval", tmp_path / side, *asked, "--json").json["perplexity"].values()
        assert values["perplexity"][side] == pytest.approx(alone["dense"])
        assert values["tokens"] == alone["tokens"]
    ids = AutoTokenizer.from_pretrained(tmp_path / "a")(tiny_text(400), add_special_tokens=False)["input_ids"]
    assert values["tokens"] == len(ids)
    assert values["windows"] == math.ceil(len(ids) / (30 - 1))
    assert "use --perplexity alone" in refused(
        "compare", tmp_path / "a", tmp_path / "b", *asked, "--prompt", "the quick"
    )
    message = refused("compare", tmp_path / "a", tmp_path / "b", "--classification", tmp_path / "text.txt")
    assert "--classification needs a head that labels are for, and a BertForMaskedLM has none; use --perplexity" in (
        message
    )


def test_data_that_do_not_fit_the_head(tmp_path: Path) -> None:
    one, other = tmp_path / "a", tmp_path / "b"
    for place in (one, other):
        write_head("chunks", place)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"words": ["ab", "cd"], "tags": ["O", "B-A"], "few": ["O"]}) + "\n")
    asked = ("compare", one, other, "--classification", rows)
    assert "a table with the words in --text-column and a label for each in --label-column" in refused(*asked)
    assert "has 2 words and 1 labels; expected one for each word" in refused(
        *asked, "--text-column", "words", "--label-column", "few"
    )
    write_head("answers", other)
    assert "have different heads: tokens and answers" in refused(*asked)


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
    assert "and a LlamaForCausalLM has none; use --perplexity" in refused(
        "compare", tiny.model, run, "--classification", tiny.heldout
    )
    long = refused("compare", tiny.model, run, "--prompt", "the dog " * 80)
    assert "more than the models' 160 positions" in long
    assert "expected a tokenizer with a chat template" in refused(
        "compare", tiny.model, run, "--prompt", "the", "--apply-chat-template"
    )
    assert "confidence" in refused("compare", tiny.model, run, *text, "--confidence", 1)
