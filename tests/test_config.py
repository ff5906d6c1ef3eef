from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lowrank_compress.errors import InputError
from lowrank_compress.recipe import Recipe, load_recipe
from lowrank_compress.stages.pipeline import default_run


def test_options_win_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("model: there\nratio: 0.2\nmethod: fwsvd\n")
    recipe = load_recipe(path, {"ratio": 0.4, "model": None, "seed": None})
    assert (recipe.model, recipe.ratio, recipe.method) == ("there", 0.4, "fwsvd")


def test_a_recipe_round_trips_through_yaml(tmp_path: Path) -> None:
    recipe = Recipe(model="somewhere", ratio=0.25, calibration="ünïcode.txt", damping_fisher=3e-5, clip=10.0)
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.to_yaml(), encoding="utf-8")
    assert load_recipe(path, {}) == recipe


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: m\nratios: 0.2\n", r"unknown option 'ratios'; known are model, ratio"),
        ("model: m\nsamples: 0\n", r"samples: .*greater than or equal to 1 \(got 0\)"),
        ("model: m\ndtype: int4\n", r"dtype is 'int4'; expected one of float32"),
        ("model: m\nratio: much\n", r"ratio: .*number.*'much'"),
        ("- a list\n", r"holds a list; expected `option: value` lines"),
        ("model: [unclosed\n", r"is not YAML"),
        ("ratio: 0.2\n", r"names no model"),
    ],
)
def test_a_bad_recipe_is_explained(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        load_recipe(path, {})


def test_a_missing_recipe_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.yaml does not exist"):
        load_recipe(tmp_path / "none.yaml", {})


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({}, "there-auto-0.3"),
        ({"method": "svd", "ratio": 0.25}, "there-svd-0.25"),
        ({"mlp": "kfac|nystrom", "qk": "dense"}, "there-auto-qk-dense-mlp-kfac+nystrom-0.3"),
    ],
)
def test_runs_of_different_methods_have_different_places(options: dict[str, Any], name: str) -> None:
    assert default_run(Recipe(model="some/there", **options)).name.endswith(name)
