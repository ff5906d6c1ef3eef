"""Bytes stand beside elements wherever these are told, and they are those of the files."""

import json
from pathlib import Path

import pytest
from safetensors import safe_open

from lowrank_compress.evaluation.size import measure_size
from lowrank_compress.model.checkpoint import Checkpoint
from tests.runs import FEW, Tiny, done
from tests.tiny import save_tiny


def sizes(directory: Path) -> dict[str, int]:
    """Bytes of each tensor, by its offsets in the file."""
    found = {}
    for path in directory.glob("*.safetensors"):
        with safe_open(path, framework="pt") as handle:
            found |= {name: handle.get_tensor(name).nbytes for name in sorted(handle.keys())}
    return found


def in_blocks(directory: Path) -> int:
    """Bytes for the matrices inside the blocks of a tiny Llama without biases: all but the norms."""
    return sum(size for name, size in sizes(directory).items() if ".layers." in name and "norm" not in name)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "options",
    [
        ["--method", "svd", "--storage", "pair"],
        ["--method", "svd", "--storage", "pivot"],
        ["--method", "svd", "--storage", "auto"],
        ["--method", "modegpt"],
        ["--method", "auto", "--mlp", "dense", "--ratio", 0.1],
        ["--method", "svd", "--storage", "pivot", "--ratio-of", "model", "--ratio", 0.2],
    ],
    ids=lambda options: " ".join(map(str, options)),
)
def test_bytes_are_those_of_the_files(tiny: Tiny, tmp_path: Path, options: list[object], dtype: str):
    run = tmp_path / "run"
    command = ["compress", tiny.model, "--calibration", tiny.text, *FEW, "--out", run, "--dtype", dtype, *options]
    planned = done(*command, "--dry-run", "--json").json["budget"]
    said = done(*command, "--json").json
    report = json.loads((run / "model" / "lowrank.json").read_text())
    assert said["claimed_bytes"] == planned["claimed_bytes"] == in_blocks(tiny.model)
    assert said["stored_bytes"] == report["stored_bytes"] == in_blocks(run / "model")
    assert measure_size(Checkpoint(run / "model")).block_bytes == report["stored_bytes"]
    before, after = (
        (sum(sizes(tiny.model).values()), sum(sizes(run / "model").values()))
        if "--ratio-of" in options
        else (in_blocks(tiny.model), in_blocks(run / "model"))
    )
    assert said["reached_ratio_bytes"] == pytest.approx(1 - after / before)
    if options[1] == "svd" and "auto" not in options:
        assert planned["uniform_bytes"] == said["stored_bytes"]


def test_rotary_indices_of_a_partial_rotation_count(tiny: Tiny, tmp_path: Path):
    run = tmp_path / "run"
    model = save_tiny("gpt_neox", tmp_path / "neox")
    done("compress", model, "--method", "cr", "--ratio", 0.05, "--calibration", tiny.text, *FEW, "--out", run)
    report = json.loads((run / "model" / "lowrank.json").read_text())
    assert measure_size(Checkpoint(run / "model")).block_bytes == report["stored_bytes"]


def test_bytes_stand_beside_elements_everywhere(tiny: Tiny, tmp_path: Path):
    run = tmp_path / "run"
    command = ["compress", *tiny.options(run, "svd"), "--dtype", "bfloat16"]
    assert "In bytes, with uniform ranks: 79.9 kB became 27." in done(*command, "--dry-run").out
    said = done(*command)
    report = json.loads((run / "model" / "lowrank.json").read_text())
    change = f"79.9 kB became {report['stored_bytes'] / 1000:.1f} kB (−{report['reached_ratio_bytes']:.2%})"
    assert change in said.out
    assert change in " ".join(done("show", run).out.split())
    card = (run / "model" / "README.md").read_text()
    assert f"{report['reached_ratio_bytes']:.2%} of their bytes (79,872 became {report['stored_bytes']:,})" in card
    shown = done("eval", run, "--perplexity", tiny.heldout).out
    assert shown.count("bytes of these") == 2
    size = done("eval", run, "--perplexity", tiny.heldout, "--json").json["size"]
    assert size["block_bytes"] == {
        "compressed": report["stored_bytes"],
        "dense": 79872,
        "ratio": pytest.approx(report["reached_ratio_bytes"]),
    }
