"""Options that an allocator or a method declares: what they take, and that only what uses them sees them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from lowrank_compress.errors import InputError
from lowrank_compress.options import CAP, FLOOR, TEMPERATURE, Option, only, settle
from tests.plugins import installed
from tests.runs import Tiny, done, refused

WIDTH = Option("width", int, 3, "how wide", least=1, most=8)
WORD = Option("word", str, None, "what is said")
FAST = Option("fast", bool, False, "whether it hurries")


@pytest.mark.parametrize(
    ("option", "given", "read"),
    [
        (WIDTH, 5, 5),
        (WIDTH, "5", 5),
        (FLOOR, 1, 1.0),
        (FLOOR, "1e-3", 0.001),
        (WORD, "7", "7"),
        (FAST, "True", True),
        (FAST, False, False),
    ],
)
def test_values_and_texts_are_read(option: Option, given: Any, read: Any) -> None:
    assert option.read(given) == read
    assert type(option.read(given)) is option.type


@pytest.mark.parametrize(
    ("option", "given", "expected"),
    [
        (WIDTH, 9, "a whole number at least 1, at most 8"),
        (WIDTH, 2.0, "a whole number"),
        (WIDTH, "2.5", "a whole number"),
        (WIDTH, True, "a whole number"),
        (TEMPERATURE, 0.0, "a number above 0"),
        (FLOOR, "nan", "a number at least 0"),
        (FLOOR, float("inf"), "a number"),
        (WORD, 7, "a text"),
        (FAST, "yes", "true or false"),
        (FAST, 1, "true or false"),
    ],
)
def test_others_are_refused(option: Option, given: Any, expected: str) -> None:
    with pytest.raises(InputError, match=f"The option {option.name} is {given!r}; expected {expected}"):
        option.read(given)


def test_what_was_given_wins_over_the_default() -> None:
    declared = [WIDTH, WORD, CAP]
    assert settle(declared, {"width": "4", "cap": None}, "them") == {"width": 4, "word": None, "cap": 0.8}
    assert only([WIDTH], {"width": 4, "cap": 1.0}) == {"width": 4}
    with pytest.raises(InputError, match=r"Unknown option 'widht'\. Did you mean 'width'\? Known: cap, .* of them"):
        settle(declared, {"widht": 4}, "them")


@pytest.mark.parametrize(
    ("words", "options"),
    [
        (["--method", "svd"], {}),
        (["--method", "asvd", "--alpha", 1], {"alpha": 1.0}),
        (["--method", "svd", "--mlp", "asvd", "--allocate", "loss"], {"alpha": 0.5, "floor": 0.0}),
        (["--method", "modegpt"], {"temperature": None, "cap": 0.8}),
        (["--method", "auto", "--floor", 0.5], {"floor": 0.5, "temperature": None, "cap": 0.8}),
    ],
)
def test_a_stage_depends_on_the_options_of_what_is_used(
    tiny: Tiny, tmp_path: Path, words: list[Any], options: dict[str, Any]
) -> None:
    done("compress", *tiny.options(tmp_path / "run"), *words, "--ratio", 0.2)
    config = json.loads((tmp_path / "run" / "scores" / "manifest.json").read_text())["key"]["config"]
    assert config["options"] == options
    assert not {"alpha", "floor", "cap", "temperature"} & config.keys()


def test_bases_serve_other_options_of_the_allocator(tiny: Tiny, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done("compress", *tiny.options(run, "kfac"), "--allocate", "loss")
    done("score", run, "--floor", 0.5, "--overwrite")  # without statistics
    done("compress", *tiny.options(tmp_path / "other", "asvd"), "--allocate", "loss")
    assert "has no statistics of block 0" in refused("score", tmp_path / "other", "--alpha", 1, "--overwrite")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--option", "width=3"], r"Unknown option 'width'"),
        (["--option", "alpha=3", "--method", "asvd"], "The option alpha is one of every recipe: pass --alpha VALUE"),
    ],
)
def test_an_option_that_nothing_declares_is_an_error(
    tiny: Tiny, tmp_path: Path, words: list[str], message: str
) -> None:
    assert message in refused("compress", *tiny.options(tmp_path / "run", "svd"), *words, "--dry-run")


PLUG_IN = """
import numpy as np

from lowrank_compress.allocation.search import loosest
from lowrank_compress.allocation.table import Allocator
from lowrank_compress.allocation.uniform import allocate as uniform
from lowrank_compress.methods.linear import GRAM, PLAIN, LinearMethod
from lowrank_compress.options import Option


def modest(curves, limit, *, spared=0):
    choice = uniform(curves, limit)
    return np.minimum(choice, np.maximum(choice - spared, 0))


ALLOCATOR = Allocator(
    name="modest", allocate=modest, needs_spectrum=False, needs_loss=False, needs_influence=False,
    options=(Option("spared", int, 0, "points left unused", least=0),), help="less than uniform",
)
METHOD = LinearMethod(
    name="gram-only", left=PLAIN, right=GRAM, paper="none", help="", options=(Option("note", str, None, "unused"),)
)
"""


@pytest.mark.slow
def test_a_plug_in_has_options_of_its_own(tiny: Tiny, tmp_path: Path) -> None:
    points = {"allocators": {"modest": "my_package:ALLOCATOR"}, "methods": {"gram-only": "my_package:METHOD"}}
    plugged = installed(tmp_path / "site", PLUG_IN, {f"lowrank_compress.{group}": points[group] for group in points})

    def lrc(*words: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "lowrank_compress", *map(str, words)]
        return subprocess.run(command, env=plugged, text=True, capture_output=True, check=False)

    run = tmp_path / "run"
    words = ["compress", *tiny.options(run, "gram-only"), "--allocate", "modest", "--option", "spared=2", "--json"]
    first = lrc(*words)
    assert first.returncode == 0, first.stderr
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    assert recipe["options"] == {"spared": 2}
    config = json.loads((run / "scores" / "manifest.json").read_text())["key"]["config"]
    assert config["options"] == {"spared": 2, "note": None}
    other = lrc("score", run, "--option", "spared=0", "--json")
    assert "config.options.spared is 2 there and 0 here" in other.stderr
    wrong = lrc(*words[:-1], "--option", "note=x", "--option", "spare=1", "--overwrite")
    assert "Unknown option 'spare'. Did you mean 'spared'? Known: note, spared." in " ".join(wrong.stderr.split())
    listed = lrc("list", "allocators", "--json")
    (entry,) = (each for each in json.loads(listed.stdout)["allocators"] if each["allocator"] == "modest")
    assert entry["options"] == "spared: points left unused (default: 0)"
