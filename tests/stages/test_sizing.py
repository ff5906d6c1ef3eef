"""A run keeps within its memory, or says before it begins that it will not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lowrank_compress.recipe import Recipe
from lowrank_compress.resources.resources import Resources
from lowrank_compress.stages.plan import make_plan
from lowrank_compress.stages.sizing import beyond, estimate
from tests.moe import save_moe
from tests.runs import Tiny, done

MB = 1_000_000
WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_local_experts": 128, "num_hidden_layers": 1}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A block of 202 MB in single precision, nearly all of it 128 experts."""
    return save_moe("mixtral", tmp_path_factory.mktemp("wide") / "model", torch.bfloat16, **WIDE)


def peak(ended: subprocess.CompletedProcess[str]) -> int:
    """Bytes that a command of its own took beyond its start, as it said."""
    cost = json.loads(ended.stdout)["cost"]
    return cost["peak_bytes"] - cost["start_bytes"]


def alone(*words: object) -> subprocess.CompletedProcess[str]:
    """Run `lrc compress` as a process."""
    command = [sys.executable, "-m", "lowrank_compress", "compress", *map(str, words), "--json"]
    return subprocess.run(command, capture_output=True, text=True, check=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "method", [["--method", "camera"], ["--method", "auto", "--experts", "camera", "--no-refine", "--ratio", "0.3"]]
)
def test_experts_in_turn_keep_within_a_budget_below_a_blocks_size(
    method: list[str], wide: Path, tiny: Tiny, tmp_path: Path
) -> None:
    words = [wide, *method, "--calibration", tiny.text, "--samples", 4, "--seq-len", 16]
    words += ["--memory-budget", "128MB", "--out", tmp_path / "run"]
    assert sum(done("compress", *words, "--dry-run", "--json").json["memory"].values()) < 128 * MB
    ended = alone(*words)
    assert "The run will take about" not in ended.stderr
    assert peak(ended) < 128 * MB


def test_a_run_says_what_it_takes_most_memory_for(wide: Path, tiny: Tiny) -> None:
    settings = {"model": str(wide), "calibration": (str(tiny.text),), "samples": 4, "seq_len": 16}
    plan = make_plan(Recipe(method="svd-llm", attention="dense", **settings))
    said = beyond(plan, Resources(128 * MB))
    assert said is not None
    assert "more than --memory-budget allows (0.13 GB); most of it for statistics (0.13 GB)" in said
    assert "--bytes" not in said
    assert beyond(plan, Resources(1_000_000 * MB)) is None
    said = beyond(make_plan(Recipe(method="auto", bytes=0.3, **settings)), Resources(128 * MB))
    assert said is not None
    assert "with all experts of a block in memory; without --bytes, one at a time is" in said


@pytest.mark.parametrize("method", ["svd", "svd-llm", "kfac"])
def test_bases_are_counted_as_they_are_kept(method: str, tiny: Tiny, tmp_path: Path) -> None:
    words = [tiny.model, "--method", method, "--calibration", tiny.text, "--samples", 4, "--seq-len", 16, "--out"]
    said = done("compress", *words, tmp_path / "run", "--dry-run", "--memory-budget", "1MB", "--json").json["memory"]
    done("compress", *words, tmp_path / "run")
    kept = [load_file(path) for path in (tmp_path / "run" / "scores").glob("basis-*.safetensors")]
    # Curves and the like, of one dimension, lie beside them.
    assert said["bases"] == max(sum(t.nbytes for t in tensors.values() if t.ndim > 1) for tensors in kept)


def test_activations_are_counted_as_far_as_tokens_go(wide: Path, tiny: Tiny) -> None:
    """A token goes to two experts; of each matrix hooks and the graph keep what enters and leaves it."""
    recipe = Recipe(model=str(wide), method="kfac", calibration=(str(tiny.text),), samples=4, seq_len=16, micro_batch=2)
    hidden, inner = WIDE["hidden_size"], WIDE["intermediate_size"]
    plan = make_plan(recipe)
    attention = sum(sum(t.shape) for t in plan.subject.resolved.targets if t.expert is None)
    expected = 2 * 16 * 4 * (2 * 2 * 3 * (hidden + inner) + 2 * attention)
    assert estimate(plan, Resources()).memory["activations"] == expected
