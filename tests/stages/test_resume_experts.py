"""A mixture of experts continues after any interruption, and ends in an undisturbed run's bytes, as dense models do."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.moe import save_moe
from tests.runs import (
    FORKER,
    Tiny,
    block_file,
    contents,
    done,
    killed_at_rename,
    looks_finished,
    lrc,
    refused,
    results,
)

FEW = ("--samples", "4", "--seq-len", "16")
# Name -> options; those of "auto" have every stage: calibrate, score, factorize, refine.
WAYS = {
    "auto": ["--method", "kfac", "--experts", "auto", "--allocate", "loss", "--refine"],
    "prune": ["--method", "svd-llm", "--experts", "reap"],
    "merge": ["--method", "svd-llm", "--experts", "merge"],
    # With no memory to speak of, every module of a block is kept in a file of its own.
    "parts": ["--method", "svd-llm", "--experts", "camera", "--memory-budget", "1"],
}


class Mixture:
    """A tiny mixture, its text, and finished runs of it, which are not to be written to."""

    def __init__(self, tiny: Tiny, place: Path) -> None:
        self.text, self.heldout, self.place = tiny.text, tiny.heldout, place
        self.model = save_moe("mixtral", place / "mixtral", num_local_experts=3)

    def options(self, run: Path, way: str) -> list[str]:
        """Arguments of `lrc compress`."""
        return [*map(str, (self.model, *WAYS[way], "--calibration", self.text, *FEW, "--out", run))]

    def pristine(self, way: str) -> Path:
        """A finished run."""
        run = self.place / way
        if not run.exists():
            done("compress", *self.options(run, way))
        return run


@pytest.fixture(scope="module")
def mixture(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Mixture:
    return Mixture(tiny, tmp_path_factory.mktemp("mixture"))


@pytest.mark.slow
def test_killed_at_random_moments(mixture: Mixture, tmp_path: Path):
    """Gradients need threads of their own, which no fork of this process has."""
    chooser = random.Random(2)
    moments = [chooser.uniform(0.05, 1.2) for _ in range(3)]
    arguments = ["compress", *mixture.options(tmp_path, "auto")][:-2]
    command = [sys.executable, "-c", FORKER, str(tmp_path), ",".join(map(str, moments)), *arguments]
    root = Path(__file__).parents[2]
    said = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.split()
    assert str(int(signal.SIGKILL)) in said, "no process was killed before it was done"
    for number in range(3):
        done("compress", *mixture.options(tmp_path / str(number), "auto"))
        assert results(tmp_path / str(number)) == results(mixture.pristine("auto"))


@pytest.mark.slow
@pytest.mark.parametrize(("way", "after"), [("prune", True), ("merge", False), ("parts", False)])
def test_killed_at_each_rename_in_turn(mixture: Mixture, tmp_path: Path, way: str, after: bool):
    run, expected = tmp_path / "run", results(mixture.pristine(way))
    number = deaths = 0
    seen: list[dict[str, str]] = [{}]
    while "model" not in looks_finished(run):
        now = contents(run) | {".lock": ""} if run.exists() else {}
        number += now in seen  # some small files are written by every process: let one more pass
        seen.append(now)
        died = killed_at_rename(number, after=after, arguments=["compress", *mixture.options(run, way)])
        assert died or way == "parts"  # which begins a block anew, and so has fewer left than it had before
        deaths += died
    done("compress", *mixture.options(run, way))
    assert deaths >= 8
    assert results(run) == expected
    assert not list(run.rglob(".*lrc-*"))
    done("verify", run)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["auto", "prune", "merge"])
def test_damage_to_experts_is_found_and_repaired(mixture: Mixture, tmp_path: Path, way: str):
    """One bit of a basis, and one number of what is stored for experts: weights, or which of them are left."""
    run = tmp_path / "run"
    done("compress", *mixture.options(run, way))
    expected, weights = results(mixture.pristine(way)), run / "model" / "model.safetensors"
    basis = block_file(run / "scores", "basis", 1)
    basis.write_bytes(basis.read_bytes()[:-1] + b"\x55")
    tensors = load_file(weights)
    leaf = {"auto": "lr_down.weight", "prune": "lr_kept", "merge": "lr_leads"}[way]
    name = next(name for name in sorted(tensors) if leaf.split(".")[0] in name and tensors[name].numel())
    tensors[name].view(-1)[0] += 1
    save_file(tensors, weights, metadata={"format": "pt"})
    said = lrc("verify", run, "--json")
    assert said.code == 2
    assert {each["file"] for each in said.json["files"] if each["state"] == "missing or altered"} == {
        f"scores/{basis.name}",
        "model/model.safetensors",
    }
    assert "model.safetensors" in refused("eval", run, "--perplexity", mixture.heldout)
    done("compress", *mixture.options(run, way), "--overwrite")
    assert {name: digest for name, digest in results(run).items() if not name.endswith(".bak")} == expected
    done("verify", run)


@pytest.mark.parametrize(("way", "leaf"), [("prune", "lr_kept"), ("merge", "lr_leads")])
@pytest.mark.parametrize("number", [-1, 3, 10**6])
def test_experts_that_are_not_there_are_refused(mixture: Mixture, tmp_path: Path, way: str, leaf: str, number: int):
    """A checkpoint that came without its run: no manifest says what it was."""
    run = mixture.pristine(way)
    model = tmp_path / "model"
    model.mkdir()
    for path in (run / "model").iterdir():
        if path.name != "manifest.json":
            (model / path.name).write_bytes(path.read_bytes())
    tensors = load_file(model / "model.safetensors")
    name = next(name for name in sorted(tensors) if name.endswith(leaf))
    tensors[name] = torch.full_like(tensors[name], number)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    said = refused("eval", model, "--perplexity", mixture.heldout)
    assert f"{leaf} does not name" in said
