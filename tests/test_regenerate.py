"""`scripts/regenerate.py`: green where bytes repeat, red for one changed bit; another machine is no change."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from lowrank_compress.artifacts.files import sha256
from lowrank_compress.stages.expectation import read_expectation
from tests.cli.test_check import edited, nudge, with_one_ulp
from tests.runs import Tiny, lrc
from tests.test_readme import parse

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "regenerate.py"
RECIPES = sorted(path.stem for path in (SCRIPT.parent.parent / "configs").glob("*.yaml"))

Main = Callable[..., int]


@pytest.fixture(scope="module")
def script() -> Any:
    """The script as a module whose commands run in this process."""
    spec = importlib.util.spec_from_file_location("regenerate", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["regenerate"] = module  # where dataclasses look for their module
    spec.loader.exec_module(module)

    def run(*words: object) -> subprocess.CompletedProcess[str]:
        said = lrc(*words)
        return subprocess.CompletedProcess([], said.code, said.out, said.err)

    module.lrc = run
    return module


@pytest.fixture
def regenerate(script: Any, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Main:
    def start(*words: object, model: Path = tiny.model, recipes: str = "kfac-loss-pivot,modegpt") -> int:
        options = ["--recipes", recipes, "--samples", 4, "--model", model, "--text", tiny.text]
        options += ["--expected", tmp_path / "expected", "--out", tmp_path / "out"]
        monkeypatch.setattr(sys, "argv", ["regenerate.py", *map(str, [*options, *words])])
        try:
            script.main()
        except SystemExit as ending:
            return 0 if ending.code in (0, None) else 1
        return 0

    return start


@pytest.mark.slow
def test_green_where_nothing_changes_and_red_for_one_ulp(
    regenerate: Main, tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert regenerate() == 1  # nothing is expected yet
    assert "write it with --write" in capsys.readouterr().out
    assert regenerate("--write") == 0
    assert regenerate() == 0
    assert (tmp_path / "out" / "report.md").read_text().count("| good | the same bytes | the same bytes |") == 2
    weight = "model.layers.0.mlp.gate_proj.weight"
    capsys.readouterr()
    assert regenerate(model=with_one_ulp(tiny, weight, tmp_path).model) == 1
    said = capsys.readouterr().out
    for recipe in ("kfac-loss-pivot", "modegpt"):
        assert f"{recipe}: BAD" in said
        report = (tmp_path / "out" / recipe / "expected.md").read_text()
        assert f"base tensor {weight}" in report
        assert "model: model.layers.0.mlp." in report
    assert weight in said


def test_another_machine_is_told_from_a_change(
    regenerate: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    assert regenerate("--write", recipes="welore") == 0
    path = tmp_path / "expected" / "welore.json"
    edited(path, nudge, path)
    assert regenerate(recipes="welore") == 0
    assert "::notice title=welore::the same bytes; against the expectation: within the tolerance" in (
        capsys.readouterr().out
    )

    def at_home(found: dict) -> None:
        here = json.loads((tmp_path / "out" / "welore" / "first.json").read_text())
        for stage in ("scores", "model"):
            found[stage]["environment"] = here[stage]["environment"]

    edited(path, at_home, path)
    assert regenerate(recipes="welore") == 1
    assert "::error title=welore::" in capsys.readouterr().out


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_has_a_command_that_parses(script: Any, recipe: str, tmp_path: Path):
    text = tmp_path / "text.txt"
    text.write_text("some text\n")
    given = parse([*map(str, script.command(recipe, Path("model"), text, 3, tmp_path))]).params
    assert (given["config"].stem, given["samples"]) == (recipe, 3)
    (text,) = given["calibration"]
    assert Path(text).exists()


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_has_an_expectation(script: Any, recipe: str):
    """Whether its bytes still come out is for `make regenerate` to say; here, that it is of this recipe and model."""
    expected = read_expectation(script.CONFIGS / "expected" / f"{recipe}.json")
    asked = yaml.safe_load((script.CONFIGS / f"{recipe}.yaml").read_text(encoding="utf-8")) | {"samples": 16}
    assert {name: expected.recipe[name] for name in asked if name != "calibration"} == {
        name: value for name, value in asked.items() if name != "calibration"
    }
    weights = "model.safetensors"
    if not asked.keys() & {"label_column", "experts"}:
        assert expected.base.files[weights] == sha256(script.MODEL / weights)


def test_an_unknown_recipe_is_refused(regenerate: Main, capsys: pytest.CaptureFixture[str]):
    assert regenerate(recipes="nothing") == 1
    assert "no recipe is called nothing" in capsys.readouterr().err
