"""Every recipe in configs/ runs as it is, but for the model, the data and their amount."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from lowrank_compress.cli.main import app
from lowrank_compress.recipe import Recipe
from tests.moe import save_moe
from tests.tiny import save_tiny, tiny_text

RECIPES = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))
SAMPLES = 8


def _data(recipe: Recipe, directory: Path) -> Path:
    if recipe.label_column is None:
        path = directory / "text.txt"
        path.write_text(tiny_text(6000), encoding="utf-8")
        return path
    path = directory / "examples.tsv"
    lines = [f"{tiny_text(40, seed)}\t{seed % 3}".replace("\n", " ") for seed in range(2 * SAMPLES)]
    path.write_text("\n".join([f"{recipe.text_column}\t{recipe.label_column}", *lines]), encoding="utf-8")
    return path


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_runs(path: Path, tmp_path: Path) -> None:
    recipe = Recipe(model="named-below", **yaml.safe_load(path.read_text(encoding="utf-8")))
    task = "lm" if recipe.label_column is None else "classification"
    # Biases, so that afm has something to restore the mean through.
    if recipe.experts is None:
        model = save_tiny("gpt2" if task == "lm" else "bert", tmp_path / "model", task)
    else:
        model = save_moe("mixtral", tmp_path / "model")
    data = ["--calibration", str(_data(recipe, tmp_path)), "--samples", str(SAMPLES), "--seq-len", "32"]
    where = ["--out", str(tmp_path / "run"), "--device", "cpu", "--json"]

    result = CliRunner().invoke(app, ["compress", str(model), "--config", str(path), *data, *where])

    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["asked_ratio"] == recipe.ratio
    assert recipe.ratio <= found["reached_ratio"] < recipe.ratio + 0.1
    written = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text(encoding="utf-8"))
    given = recipe.model_dump(exclude_unset=True, exclude={"model", "calibration", "samples"})
    assert {name: written[name] for name in given} == given


def test_there_are_recipes() -> None:
    assert {path.stem for path in RECIPES} >= {"auto", "fwsvd", "svd-llm", "classifier-fwsvd"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_says_how_to_run_it(path: Path) -> None:
    assert f"--config configs/{path.name}" in path.read_text(encoding="utf-8")
