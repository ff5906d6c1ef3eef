"""What Python programs call: the same as the command line, in silence."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import lowrank_compress
from lowrank_compress import LrcError, compress, evaluate, load
from lowrank_compress.recipe import Recipe
from tests.runs import Tiny, done, lrc, results, times
from tests.tiny import save_tiny, tiny_text

Finished = Callable[[str], Path]
SMALL = {"samples": 8, "seq_len": 32}


class Heard:
    """A reporter that remembers."""

    def __init__(self) -> None:
        self.steps: list[str] = []
        self.warnings: list[str] = []

    def advance(self, step: str, done: int, total: int) -> None:
        self.steps.append(step)

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def test_compress_makes_the_bytes_of_the_command_line(
    tiny: Tiny, pristine: Finished, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    heard = Heard()
    result = compress(tiny.model, calibration=tiny.text, out=tmp_path / "run", **SMALL, reporter=heard)
    assert capfd.readouterr() == ("", "")
    assert {"tokenize", "decompose", "write"} <= set(heard.steps)
    assert results(tmp_path / "run") == results(pristine("auto"))
    assert (result.path, result.run) == (tmp_path / "run" / "model", tmp_path / "run")
    before = times(tmp_path / "run" / "model")
    again = compress(tiny.model, calibration=tiny.text, out=tmp_path / "run", **SMALL)
    assert dataclasses.replace(again, cost=result.cost) == result
    assert times(tmp_path / "run" / "model") == before


def test_the_report_says_what_was_reached(tiny: Tiny, tmp_path: Path) -> None:
    result = compress(tiny.model, 0.25, method="kfac", calibration=tiny.text, out=tmp_path / "run", **SMALL)
    whole = json.loads((result.path / "lowrank.json").read_text())
    assert {name: whole[name] for name in result.report.keys() & whole.keys()} == {
        name: value for name, value in result.report.items() if name in whole
    }
    assert result.report["asked_ratio"] == 0.25
    assert 0.25 <= result.report["reached_ratio"] < 0.3
    assert result.report["predicted_loss"] == sum(each["predicted_loss"] for each in whole["matrices"].values()) > 0
    assert compress(tiny.model, method="svd", out=tmp_path / "other").report["predicted_loss"] is None


def test_load_takes_runs_and_checkpoints(pristine: Finished, tiny: Tiny) -> None:
    run, ids = pristine("auto"), torch.arange(4, 24).view(2, 10)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(run / "model").eval()(ids).logits
        for place in (run, str(run / "model")):
            assert torch.equal(load(place).eval()(ids).logits, expected)
        assert load(run, dtype=torch.bfloat16).dtype == torch.bfloat16
    assert "lowrank" not in str(getattr(load(tiny.model).config, "quantization_config", ""))


def test_the_result_is_what_the_run_has_come_to(finished: Finished, tiny: Tiny) -> None:
    run = finished("svd")
    given = {"method": "svd", "calibration": tiny.text, "samples": 8, "seq_len": 32, "out": run}
    before = compress(tiny.model, **given)
    assert before.path == run / "model"
    made = done("cast", run, "--dtype", "bfloat16", "--json").json
    result = compress(tiny.model, **given)
    assert (result.path, result.id) == (run / "cast", made["id"])
    assert result.report["stored_bytes"] == before.report["stored_bytes"] // 2
    assert next(result.load().parameters()).dtype == torch.bfloat16


def test_a_classifier_is_loaded_as_one(tmp_path: Path) -> None:
    result = compress(save_tiny("bert", tmp_path / "model", "classification"), method="svd", out=tmp_path / "run")
    assert result.load()(torch.arange(4, 24).view(2, 10)).logits.shape == (2, 3)


def test_a_damaged_run_is_not_loaded(finished: Finished) -> None:
    run = finished("svd")
    (run / "model" / "config.json").write_text("{}")
    with pytest.raises(LrcError, match=r"config\.json"):
        load(run)


def test_evaluate_is_the_command(tiny: Tiny, finished: Finished, capfd: pytest.CaptureFixture[str]) -> None:
    run = finished("svd")
    name = str(tiny.heldout)
    expected = done("eval", run, "--perplexity", name, "--seq-len", 32, "--json").json
    capfd.readouterr()
    heard = Heard()
    assert evaluate(run, perplexity=tiny.heldout, seq_len=32, reporter=heard) == expected
    assert heard.steps == []  # it is kept in the run
    alone = evaluate(run / "model", perplexity=[name], seq_len=32, reporter=heard)["perplexity"][name]
    assert alone == {key: value for key, value in expected["perplexity"][name].items() if key != "dense"}
    assert heard.steps != []
    assert capfd.readouterr() == ("", "")


def test_the_calibration_text_measures_nothing(tiny: Tiny, pristine: Finished, tmp_path: Path) -> None:
    same = tmp_path / "same.txt"
    same.write_text(tiny_text(8000))
    with pytest.raises(LrcError, match="calibrated on"):
        evaluate(pristine("auto"), perplexity=same)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"ratios": 0.3}, r"The call of compress: unknown option 'ratios'; known are model"),
        ({"samples": 0}, r"The call of compress: samples: .* \(got 0\)"),
        ({"method": "svdd"}, r"Unknown method 'svdd'. Did you mean 'svd'"),
        ({"ratio": 1.5}, "not between 0 and 1"),
        ({"memory_budget": "much"}, "no size"),
    ],
)
def test_what_is_wrong_is_an_error_of_ours(tiny: Tiny, tmp_path: Path, given: dict, message: str) -> None:
    with pytest.raises(LrcError, match=message):
        compress(tiny.model, out=tmp_path / "run", **given)
    assert not (tmp_path / "run").exists()


def test_options_of_an_evaluation_are_checked(tiny: Tiny) -> None:
    with pytest.raises(LrcError, match="The call of evaluate: unknown option 'sequence'"):
        evaluate(tiny.model, perplexity=tiny.heldout, sequence=8)


def test_a_run_goes_where_the_command_would_put_it(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = compress(tiny.model, 0.2, method="svd")
    assert result.run == Path("runs") / f"{tiny.model.name}-svd-0.2"
    assert lrc("verify", result.run).code == 0


def test_names_are_there_for_whoever_looks() -> None:
    assert {"compress", "evaluate", "load", "Recipe", "Result", "LrcError"} <= set(dir(lowrank_compress))
    assert lowrank_compress.Recipe is Recipe
    with pytest.raises(AttributeError, match="no attribute 'compres'"):
        lowrank_compress.compres  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]
