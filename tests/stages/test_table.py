"""Every stage is an entry, and one from another package is followed by all commands that take a run."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lowrank_compress import registry
from lowrank_compress.artifacts.directories import replacing
from lowrank_compress.artifacts.manifest import Key, Manifest, commit, committed, listed
from lowrank_compress.model.checkpoint import Checkpoint
from lowrank_compress.resources.resources import Resources
from lowrank_compress.stages.chain import extend
from lowrank_compress.stages.identity import checkpoint_id
from lowrank_compress.stages.index import read_index
from lowrank_compress.stages.reporting import Reporter
from lowrank_compress.stages.run import Run
from lowrank_compress.stages.stage import Given, Stage
from lowrank_compress.stages.table import STAGES, directories, in_order
from lowrank_compress.strict import Strict
from tests.runs import Tiny, done, lrc, refused

Finished = Callable[[str], Path]


class QuieterConfig(Strict):
    factor: float


def quieter(
    config: QuieterConfig,
    inputs: Given,
    out_dir: Path,
    reporter: Reporter | None = None,
    *,
    resources: Resources = Resources(),
    overwrite: bool = False,
) -> Manifest:
    """Multiply the final norm by a factor."""
    key = Key("quieter", 1, config.model_dump(), {"checkpoint": checkpoint_id(inputs.checkpoint)})
    if (found := committed(out_dir, key, overwrite=overwrite)) is not None:
        return found
    with replacing(out_dir, listed) as draft:
        for path in inputs.checkpoint.path.iterdir():
            if path.name != "manifest.json":
                shutil.copyfile(path, draft / path.name)
        tensors = load_file(draft / "model.safetensors")
        tensors["model.norm.weight"] *= config.factor
        save_file(tensors, draft / "model.safetensors", metadata={"format": "pt"})
        return commit(draft, key, [path.name for path in draft.iterdir()], inputs.report or {}, {})


QUIETER = Stage(
    name="quieter",
    version=1,
    config=QuieterConfig,
    inputs=Given,
    run=quieter,
    reads="checkpoint",
    writes="checkpoint",
    directory="quieter",
    command="quieter",
    help="a smaller final norm",
)


@pytest.fixture
def plugged(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Have QUIETER in the table, as from another package."""
    point = EntryPoint("quieter", f"{__name__}:QUIETER", "lowrank_compress.stages")
    monkeypatch.setattr(registry, "entry_points", lambda group: [point] if group == point.group else [])
    monkeypatch.setattr(STAGES, "_all", None)
    yield
    monkeypatch.setattr(STAGES, "_all", None)


def test_entries_agree_with_each_other():
    assert [stage.name for stage in in_order()] == [
        *("calibrate", "score", "factorize", "refine"),
        *("recover", "cache", "cast", "quantize", "evaluate"),
    ]
    assert all(name == stage.name for name, stage in STAGES.items())
    assert len({stage.directory for stage in in_order()}) == len(STAGES)
    for stage in in_order():
        assert not stage.changes_weights or stage.directory == stage.name
    places = [path.name for path in directories(Run(Path("run")))]
    made = ("stats", "scores", "model", "refine", "recover", "cache", "cast", "quantize", "eval")
    assert places == [*made, "unrefined", "unquantized", "work"]


@pytest.mark.parametrize("name", [stage.name for stage in in_order()])
def test_every_stage_has_a_command(name: str):
    assert lrc(STAGES[name].command, "--help").code == 0


@pytest.mark.usefixtures("plugged")
def test_a_stage_of_another_package_is_followed(tiny: Tiny, finished: Finished, tmp_path: Path):
    assert "a smaller final norm" in done("list", "stages").out
    run, wanted = finished("svd"), torch.arange(4, 12)[None]
    extend(Run(run), QUIETER, QuieterConfig(factor=0.5))
    done("cast", run, "--dtype", "float64")
    assert [link.stage for link in read_index(run / "run.json").chain] == ["factorize", "quieter", "cast"]
    one, two = (AutoModelForCausalLM.from_pretrained(run / name)(wanted).logits for name in ("model", "cast"))
    torch.testing.assert_close(one.double() / 2, two, rtol=1e-4, atol=1e-4)
    assert done("verify", run, "--json").json["ok"]
    assert {"quieter/model.safetensors", "cast/model.safetensors"} <= {
        finding["file"] for finding in done("verify", run, "--json").json["files"]
    }
    before = done("eval", run / "model", "--perplexity", tiny.heldout, "--json").json["perplexity"]
    after = done("eval", run, "--perplexity", tiny.heldout, "--json").json["perplexity"]
    assert before != after
    assert lrc("export", run, "--dense", run / "quieter").code == 2
    # The stage before another: what came after it goes.
    extend(Run(run), QUIETER, QuieterConfig(factor=0.25), overwrite=True)
    assert [link.stage for link in read_index(run / "run.json").chain] == ["factorize", "quieter"]
    assert "cast/manifest.json (of another result)" in lrc("verify", run).text
    assert "inputs.checkpoint is" in refused("cast", run, "--dtype", "float64")
    done("cast", run, "--dtype", "float64", "--overwrite")
    done("verify", run)


@pytest.mark.usefixtures("plugged")
def test_a_checkpoint_behind_the_chain_that_was_replaced_is_noticed(finished: Finished):
    run = finished("svd")
    extend(Run(run), QUIETER, QuieterConfig(factor=0.5))
    done("cast", run, "--dtype", "bfloat16")
    quieter(QuieterConfig(factor=0.1), Given(Checkpoint(run / "model")), run / "quieter", overwrite=True)
    assert "quieter is not the checkpoint that run.json names" in refused("show", run)


def test_versions_are_those_of_the_manifests(pristine: Finished):
    for stage in (stage for stage in in_order() if stage.reads == "recipe"):
        found = (pristine("svd") / stage.directory / "manifest.json").read_text()
        assert f'"stage": "{stage.name}",\n    "version": {stage.version},' in found
