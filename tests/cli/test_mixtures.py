"""Calibration on several texts: what is a weight, what is drawn of each, what ids and reports hold of it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from lowrank_compress import api
from lowrank_compress.config import CalibrationSet
from lowrank_compress.errors import InputError
from lowrank_compress.model.checkpoint import Checkpoint
from lowrank_compress.recipe import make_recipe
from lowrank_compress.stages.samples import batches_by_text, held_out_batches
from lowrank_compress.texts import TextPart, weighed
from tests.runs import FEW, Tiny, done, refused, results
from tests.tiny import tiny_text


@pytest.fixture
def texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, seed in (("one.txt", 5), ("two.txt", 6), ("odd:2", 7)):
        (tmp_path / name).write_text(tiny_text(6000, seed))
    rows = [{"content": tiny_text(300, 20 + i), "text": "no"} for i in range(20)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("one.txt", ("one.txt", 1)),
        ("one.txt:2", ("one.txt", 2)),
        ("one.txt:0.5", ("one.txt", 0.5)),
        ("./one.txt:3", ("./one.txt", 3)),
        ("odd:2", ("odd:2", 1)),  # a file that has the whole for its name
        ("odd:2:3", ("odd:2", 3)),
        ("odd:3", ("odd:3", 1)),  # no file is called odd
        ("no.txt:2", ("no.txt:2", 1)),
        ("one.txt:-1", ("one.txt:-1", 1)),
        (r"C:\texts\one.txt", (r"C:\texts\one.txt", 1)),
        ("self", ("self", 1)),
        ("self:2", ("self", 2)),
        ("hf:name:2", ("hf:name:2", 1)),  # its configuration
        ("hf:name:config:2", ("hf:name:config:2", 1)),  # its split
        ("hf:name:config:train:2", ("hf:name:config:train", 2)),
        ("hf:name:::2", ("hf:name::", 2)),
        ("hf:name::train[:1000]", ("hf:name::train[:1000]", 1)),
        ("hf:name::train[10:20]:1.5", ("hf:name::train[10:20]", 1.5)),
    ],
)
def test_what_is_a_weight(word: str, expected: tuple[str, float], texts: Path) -> None:
    assert weighed(word) == expected


def test_one_text_is_as_it_was(texts: Path) -> None:
    for said in ("one.txt", "one.txt:3", ["one.txt"], [{"text": "one.txt", "weight": 2}]):
        assert make_recipe({"model": "m", "calibration": said}, "The test").calibration == "one.txt"


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (["one.txt", "one.txt:2"], "calibration names one.txt twice; expected it once, with a weight"),
        (["one.txt", "two.txt:0"], "calibration: weight: Input should be greater than 0"),
        (["one.txt", {"txt": "two.txt"}], "calibration: .*unknown option 'txt'"),
        (["one.txt", 7], "calibration holds 7; expected the name of a text"),
    ],
)
def test_what_no_mixture_is(said: Any, message: str, texts: Path) -> None:
    with pytest.raises(InputError, match=message):
        make_recipe({"model": "m", "calibration": said}, "The test")


def config_of(source: Any, samples: int, **more: Any) -> CalibrationSet:
    return CalibrationSet(source=source, samples=samples, seq_len=32, seed=3, micro_batch=4, **more)


def test_each_text_gives_its_share_of_windows(texts: Path, tiny: Tiny) -> None:
    checkpoint = Checkpoint(tiny.model)
    mixture = (
        TextPart(text="one.txt", weight=2),
        TextPart(text="two.txt"),
        TextPart(text="rows.jsonl", text_column="content"),
    )
    found = batches_by_text(config_of(mixture, 16), checkpoint, "lm")
    alone = [("one.txt", 8, {}), ("two.txt", 4, {}), ("rows.jsonl", 4, {"text_column": "content"})]
    for own, (text, samples, column) in zip(found, alone, strict=True):
        (expected,) = batches_by_text(config_of(text, samples, **column), checkpoint, "lm")
        assert all(torch.equal(a.ids, b.ids) for a, b in zip(own, expected, strict=True))
    held = held_out_batches(config_of(mixture, 16), checkpoint, "lm")
    seen = {tuple(row) for part in found for batch in part for row in batch.ids.tolist()}
    assert not seen & {tuple(row) for batch in held for row in batch.ids.tolist()}


def dense_perplexity(model: Path, windows: list[torch.Tensor]) -> float:
    stock = AutoModelForCausalLM.from_pretrained(model).eval()
    with torch.no_grad():
        losses = [stock(ids[None], labels=ids[None]).loss for ids in windows]
    return math.exp(sum(map(float, losses)) / len(losses))


@pytest.mark.parametrize("method", ["svd-llm", "kfac"])
def test_a_mixture_from_end_to_end(method: str, texts: Path, tiny: Tiny) -> None:
    words = ["--calibration", "one.txt:3", "--calibration", "two.txt"]
    options = [tiny.model, "--method", method, "--samples", "8", "--seq-len", "32"]
    done("compress", *options, *words, "--out", "run")
    said = yaml.safe_load(Path("run/recipe.yaml").read_text())["calibration"]
    assert said == [{"text": str(texts / n), "weight": w} for n, w in (("one.txt", 3.0), ("two.txt", 1.0))]
    done("compress", "--config", "run/recipe.yaml", "--out", "again")
    assert results(Path("again")) == results(Path("run"))
    by_text = batches_by_text(config_of(("one.txt:3", "two.txt"), 8).model_copy(update={"seed": 0}),
                              Checkpoint(tiny.model), "lm")  # fmt: skip
    shown = done("show", "run", "--json").json["texts"]
    assert [(each["text"], each["weight"], each["windows"]) for each in shown] == [("one.txt", 3, 6), ("two.txt", 1, 2)]
    for each, batches in zip(shown, by_text, strict=True):
        windows = [row for batch in batches for row in batch.ids]
        assert each["tokens"] == 32 * len(windows)
        assert each["perplexity"] == pytest.approx(dense_perplexity(tiny.model, windows), rel=1e-4)
    text = " ".join(done("show", "run").out.split())
    assert "Calibrated on two.txt, weight 1: 2 windows or examples, 64 tokens, dense perplexity" in text
    for name in ("one.txt", "two.txt"):
        assert "is the text that this run was calibrated on" in refused("eval", "run", "--perplexity", name)
    other = ["--calibration", "one.txt:2", "--calibration", "two.txt"]
    assert "mixture" in refused("compress", *options, *other, "--out", "run")


def test_the_same_from_python_and_in_one_text(texts: Path, tiny: Tiny) -> None:
    given: dict[str, Any] = {"method": "svd-llm", "samples": 8, "seq_len": 32}
    mixed = api.compress(tiny.model, 0.3, calibration=["one.txt", Path("two.txt")], out="mixed", **given)
    one = api.compress(tiny.model, 0.3, calibration="one.txt", out="one", **given)
    weighed = api.compress(tiny.model, 0.3, calibration=["one.txt:4"], out="weighed", **given)
    assert one.id == weighed.id != mixed.id
    assert results(Path("one")) == results(Path("weighed"))


def test_a_text_that_gives_nothing_or_is_not_there(texts: Path, tiny: Tiny) -> None:
    base = ["compress", tiny.model, "--method", "svd-llm", "--samples", "8", "--seq-len", "32", "--out", "run"]
    few = refused(*base, "--calibration", "one.txt:20", "--calibration", "two.txt")
    assert "Of --samples 8 none would be of two.txt" in few
    assert "The text file no.txt does not exist" in refused(
        *base, "--calibration", "one.txt", "--calibration", "no.txt"
    )
    assert not Path("run").exists()
    (texts / "short.txt").write_text(tiny_text(150))
    warned = done(*base, "--calibration", "one.txt", "--calibration", "short.txt")
    assert "short.txt has 1 windows, fewer than the 4 asked for" in warned.text


def test_recover_and_refine_take_several(texts: Path, tiny: Tiny) -> None:
    words = ["--calibration", "one.txt:3", "--calibration", "two.txt"]
    done("compress", tiny.model, "--method", "kfac", *FEW, *words, "--out", "run")
    done("refine", "run", "--calibration", "two.txt", "--calibration", "one.txt")
    done("recover", "run", "--steps", "2", "--seq-len", "32", "--lr", "1e-4")
    assert Path("run/recover/config.json").exists()
