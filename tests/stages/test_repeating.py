"""The commands that a report names make the same run again."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from lowrank_compress.cli.main import app
from lowrank_compress.stages.cost import read_cost
from lowrank_compress.stages.index import read_index
from lowrank_compress.stages.repeating import commands_of, flag_of, told
from lowrank_compress.stages.run import Run
from tests.runs import Tiny, done

Finished = Callable[[str], Path]


def commands(path: Path) -> list[str]:
    run = Run(path)
    return commands_of(run, read_index(run.index))


def chain(path: Path) -> list[dict[str, str]]:
    return json.loads((path / "run.json").read_text())["chain"]


@pytest.mark.slow
def test_a_chain_is_made_again(finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = finished("svd-llm")
    done("recover", run, "--steps", 2, "--batch", 2, "--seq-len", 16)
    done("cast", run, "--dtype", "bfloat16")
    done("quantize", run, "--bits", 4, "--group", 16, "--asymmetric", "--rounding", "rtn")
    said = commands(run)
    assert said == [
        "lrc compress --config recipe.yaml --out AGAIN",
        "lrc recover AGAIN --steps 2 --batch 2 --seq-len 16",
        "lrc cast AGAIN --dtype bfloat16",
        "lrc quantize AGAIN --rounding rtn --bits 4 --group 16 --asymmetric",
    ]
    place = tmp_path / "elsewhere"
    place.mkdir()
    monkeypatch.chdir(place)
    shutil.copy(run / "recipe.yaml", place)
    for command in said:
        done(*shlex.split(command)[1:])
    assert chain(place / "AGAIN") == chain(run)
    # What each command took stands beside the result.
    cost = read_cost(Run(place / "AGAIN"))
    assert cost is not None
    assert list(cost) == ["compress", "recover", "cast", "quantize"]
    assert all(each["seconds"] and each["peak_bytes"] > 0 for each in cost.values())


def test_a_refined_run_is_made_by_its_recipe(pristine: Finished) -> None:
    assert [link["stage"] for link in chain(pristine("auto"))] == ["factorize", "refine"]
    assert commands(pristine("auto")) == ["lrc compress --config recipe.yaml --out AGAIN"]


def test_a_text_of_another_command_is_left_open(finished: Finished, tiny: Tiny) -> None:
    run = finished("svd-llm")
    done("recover", run, "--steps", 1, "--batch", 2, "--calibration", tiny.heldout)
    assert commands(run)[1] == "lrc recover AGAIN --steps 1 --batch 2 --calibration TEXT"
    done("recover", run, "--steps", 1, "--batch", 2, "--text", tiny.text, "--overwrite")
    assert commands(run)[1] == "lrc recover AGAIN --steps 1 --batch 2 --text TEXT"


@pytest.mark.slow
def test_all_that_a_quantization_was_told_is_said(finished: Finished) -> None:
    run = finished("svd-llm")
    asked = "--rounding quantease --bits 4 --group 8 --residual-rank 2 --smooth --outliers 3 --activation-bits 8"
    done("quantize", run, *asked.split())
    assert commands(run)[1] == f"lrc quantize AGAIN {asked}"
    asked = "--rounding quantease --bytes 0.2 --group 8 --residual-rank 2 --residual-inside"
    done("quantize", run, *asked.split(), "--overwrite")
    assert commands(run)[1] == f"lrc quantize AGAIN {asked}"


@pytest.mark.parametrize("stage", ["refine", "recover", "cast", "quantize"])
def test_each_setting_of_a_stage_is_an_option_of_its_command(stage: str) -> None:
    command: Any = get_command(app)
    known = {option for each in command.commands[stage].params for option in each.opts}
    assert {flag_of(name) for name in told(stage)} <= known
    assert bool(told(stage)) == (stage != "refine")
