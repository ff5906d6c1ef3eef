"""Stages are pure functions: a recipe gives the same bytes whichever way it is run, and a second run does nothing."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lowrank_compress.recipe import Recipe
from lowrank_compress.resources.resources import Resources
from lowrank_compress.stages import pipeline
from lowrank_compress.stages.plan import make_plan
from lowrank_compress.stages.run import Run
from tests.runs import Tiny, block_file, contents, done, refused, results, times

Finished = Callable[[str], Path]


@pytest.mark.parametrize("method", ["svd", "auto"])
def test_a_repetition_elsewhere_gives_the_same_bytes(tiny: Tiny, pristine: Finished, tmp_path: Path, method: str):
    done("compress", *tiny.options(tmp_path / "again", method))
    assert results(tmp_path / "again") == results(pristine(method))
    assert not (tmp_path / "again" / "work").exists()


def test_a_second_run_computes_nothing(tiny: Tiny, finished: Finished):
    run = finished("auto")
    before = {name: time for name, time in times(run).items() if name not in ("recipe.yaml", "run.json", ".lock")}
    said = done("compress", *tiny.options(run), "--json")
    assert {name: time for name, time in times(run).items() if name in before} == before
    assert said.err == ""
    assert said.json["run"] == str(run)


def test_separate_commands_give_the_same_bytes(tiny: Tiny, pristine: Finished, tmp_path: Path):
    run = tmp_path / "run"
    calibrated = done("calibrate", *tiny.options(run), "--json").json
    scored = done("score", run, "--json").json
    factorized = done("factorize", run, "--json").json
    assert results(run) == results(pristine("auto"))
    assert calibrated["tokens"] == 8 * 32
    assert calibrated["kept"] is True
    assert scored["stored_elements"] >= factorized["stored_elements"]
    assert {path.name for path in (run / "stats").iterdir()} == {
        *(block_file(run / "stats", "block", block).name for block in (0, 1)),
        "manifest.json",
    }


def test_kept_statistics_change_nothing(tiny: Tiny, pristine: Finished, tmp_path: Path):
    run = tmp_path / "run"
    done("compress", *tiny.options(run), "--keep-statistics")
    assert block_file(run / "stats", "block", 1).exists()
    assert results(run) == results(pristine("auto"))
    assert not list((pristine("auto") / "stats").glob("*.safetensors"))


def test_compress_uses_the_statistics_that_calibrate_kept(tiny: Tiny, pristine: Finished, tmp_path: Path):
    run = tmp_path / "run"
    done("calibrate", *tiny.options(run))
    before = times(run / "stats")
    said = done("compress", *tiny.options(run))
    assert times(run / "stats") == before
    assert "tokenize" not in said.err
    assert results(run) == results(pristine("auto"))


def test_the_recipe_of_a_run_repeats_it(pristine: Finished, tmp_path: Path):
    recipe = pristine("auto") / "recipe.yaml"
    done("compress", "--config", recipe, "--out", tmp_path / "other")
    assert results(tmp_path / "other") == results(pristine("auto"))
    assert (tmp_path / "other" / "recipe.yaml").read_text() == recipe.read_text()


def test_an_option_wins_over_the_recipe(pristine: Finished, tmp_path: Path):
    said = done(
        "compress", "--config", pristine("svd") / "recipe.yaml", "--ratio", 0.5, "--out", tmp_path / "r", "--json"
    )
    assert said.json["asked_ratio"] == 0.5 <= said.json["reached_ratio"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (["--ratio", 0.4], "ratio is 0.3 there and 0.4 here"),
        (["--seed", 1, "--ratio", 0.4], "ratio is 0.3 there and 0.4 here"),
        (["--seed", 1], "seed is 0 there and 1 here"),
        (["--dtype", "bfloat16"], "dtype is 'float32' there and 'bfloat16' here"),
        (["--method", "svd-llm"], "method is 'auto' there and 'svd-llm' here"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_another_recipe_is_refused_and_overwrite_replaces(
    tiny: Tiny, finished: Finished, tmp_path: Path, change: list[object], difference: str
):
    run, fresh = finished("auto"), tmp_path / "fresh"
    before = contents(run)
    message = refused("compress", *tiny.options(run), *change)
    assert difference in message
    assert "--overwrite" in message
    assert contents(run) | {".lock": ""} == before | {".lock": ""}
    done("compress", *tiny.options(run), *change, "--overwrite")
    done("compress", *tiny.options(fresh), *change)
    assert contents(run / "model") == contents(fresh / "model")
    assert (run / "recipe.yaml").read_text() == (fresh / "recipe.yaml").read_text()
    done("verify", run)


@pytest.mark.slow
def test_another_ratio_reuses_the_bases(tiny: Tiny, finished: Finished, tmp_path: Path):
    run = finished("auto")
    before = {name: time for name, time in times(run / "scores").items() if name.startswith("basis")}
    ranks = (run / "scores" / "ranks.json").read_text()
    assert "config.ratio is 0.3 there and 0.5 here" in refused("score", run, "--ratio", 0.5)
    assert done("score", run, "--ratio", 0.5, "--overwrite", "--json").json["reached_ratio"] >= 0.5
    assert {name: time for name, time in times(run / "scores").items() if name.startswith("basis")} == before
    assert (run / "scores" / "ranks.json").read_text() != ranks
    assert not (run / "scores" / "ranks.json.bak").exists()
    assert yaml.safe_load((run / "recipe.yaml").read_text())["ratio"] == 0.5
    assert done("factorize", run, "--overwrite", "--json").json["reached_ratio"] >= 0.5
    done("compress", *tiny.options(tmp_path / "direct"), "--ratio", 0.5)
    assert results(run) == results(tmp_path / "direct")


def test_ranks_of_another_allocator_from_kept_statistics(tiny: Tiny, tmp_path: Path):
    run, direct = tmp_path / "run", tmp_path / "direct"
    done("calibrate", *tiny.options(run))
    done("score", run)
    done("score", run, "--allocate", "uniform", "--storage", "pair", "--overwrite")
    done("factorize", run)
    done("compress", *tiny.options(direct), "--allocate", "uniform", "--storage", "pair")
    assert results(run) == results(direct)


def test_scores_that_need_dropped_statistics_are_refused(finished: Finished):
    run = finished("auto")
    message = refused("score", run, "--damping-gram", 0.01, "--overwrite")
    assert "has no statistics of block 0" in message
    assert "--keep-statistics" in message


def test_another_output_dtype_needs_no_new_scores(tiny: Tiny, finished: Finished, tmp_path: Path):
    run, direct = finished("auto"), tmp_path / "direct"
    before = times(run / "scores")
    done("factorize", run, "--dtype", "bfloat16", "--overwrite")
    done("compress", *tiny.options(direct), "--dtype", "bfloat16")
    assert times(run / "scores") == before
    assert results(run) == results(direct)
    assert (run / "recipe.yaml").read_text() == (direct / "recipe.yaml").read_text()


def test_a_text_counts_by_its_content(tiny: Tiny, pristine: Finished, tmp_path: Path):
    moved = tmp_path / "moved.txt"
    moved.write_bytes(tiny.text.read_bytes())
    done("compress", *tiny.options(tmp_path / "run", text=moved))
    assert results(tmp_path / "run") == results(pristine("auto"))


def test_a_changed_text_is_another_recipe(tiny: Tiny, tmp_path: Path):
    text = tmp_path / "text.txt"
    text.write_bytes(tiny.text.read_bytes())
    done("compress", *tiny.options(tmp_path / "run", text=text))
    text.write_text(tiny.heldout.read_text())
    assert "inputs.calibration is" in refused("compress", *tiny.options(tmp_path / "run", text=text))


def test_a_failed_start_does_not_claim_the_directory(tiny: Tiny, tmp_path: Path):
    run = tmp_path / "run"
    refused("compress", *tiny.options(run, text=tmp_path / "nothing.txt"))
    done("compress", *tiny.options(run))


@dataclass(frozen=True)
class Watched(Resources):
    """Keeps how many blocks were decomposed together, and how many matrices at a time."""

    seen: list[tuple[int, int]] = field(default_factory=list)

    def each(self, work: Callable[[Any], Any], items: Sequence[Any], size: Callable[[Any], int]) -> list[Any]:
        self.seen.append((len({unit.block for unit in items}), self.items_at_once(map(size, items))))
        return super().each(work, items, size)


def test_matrices_are_decomposed_at_once_as_memory_allows(tiny: Tiny, tmp_path: Path):
    recipe = Recipe(model=str(tiny.model), calibration=str(tiny.text), samples=8, seq_len=32, method="kfac")
    plan, seen = make_plan(recipe), {}
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for memory in (1, 300_000, 8 << 30):
            resources = Watched(memory)
            pipeline.compress(plan, Run(tmp_path / str(memory)), resources=resources)
            seen[memory] = resources.seen
    finally:
        torch.set_num_threads(threads)
    assert seen == {1: [(1, 1), (1, 1)], 300_000: [(1, 2), (1, 2)], 8 << 30: [(2, 2)]}
    assert results(tmp_path / "1") == results(tmp_path / "300000") == results(tmp_path / str(8 << 30))
