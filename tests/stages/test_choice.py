"""Whole plans: the dense model with its matrices replaced is the compressed model, and the best plan is taken."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lowrank_compress.artifacts.manifest import read_manifest
from lowrank_compress.model.skeleton import Skeleton
from lowrank_compress.model.walk.batch import Batch
from lowrank_compress.recipe import Recipe
from lowrank_compress.stages import choice, pipeline, samples
from lowrank_compress.stages.decompose import Bases
from lowrank_compress.stages.plan import make_plan
from lowrank_compress.stages.run import Run
from lowrank_compress.stages.samples import few_tokens
from tests.runs import Tiny, done


@pytest.fixture(scope="module")
def halved(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of auto with few tokens and half of the parameters removed."""
    out = tmp_path_factory.mktemp("choice") / "run"
    done("compress", *tiny.options(out), "--ratio", 0.5, "--no-refine", "--no-second")
    return out


def test_replaced_matrices_compute_what_the_compressed_model_does(halved: Path, tiny: Tiny):
    plan = make_plan(Recipe(**json.loads(json.dumps(dict(model=str(tiny.model), calibration=str(tiny.text), samples=8,
                                                         seq_len=32, ratio=0.5)))))  # fmt: skip
    run = Run(halved)
    bases = Bases(plan.chooser, pipeline.inputs_of_score(plan, run).calibration.id, run.scores)
    report = read_manifest(run.scores).report  # pyright: ignore[reportOptionalMemberAccess]
    taken = next(found for found in choice.plans_of(bases) if found.name == report["plan"])
    ids = torch.randint(3, 60, (2, 20), generator=torch.Generator().manual_seed(0))
    (found,) = choice.divergences(Skeleton(plan.checkpoint, torch.device("cpu"), torch.float32), [Batch(ids)], [taken])
    with torch.no_grad():
        logits = [
            AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(ids).logits[:, :-1].double().log_softmax(-1)
            for path in (tiny.model, run.model)
        ]
    expected = (logits[0].exp() * (logits[0] - logits[1])).sum(-1).mean()
    assert found > 1e-4
    assert found == pytest.approx(float(expected), rel=1e-3)


def test_the_plan_of_least_divergence_is_taken_and_reported(halved: Path):
    report = json.loads((halved / "model" / "lowrank.json").read_text())
    totals = {entry["plan"]: entry["divergence"] + choice.FAR * entry["at_random"] for entry in report["plans"]}
    assert len(totals) > 2
    assert choice.BY_SEQUENCE in totals
    assert report["plan"] == min(totals, key=totals.__getitem__)
    said = done("show", halved)
    assert f"Plan {report['plan']} (taken)" in said.out


def test_whole_plans_are_tried_where_little_is_removed(tiny: Tiny, tmp_path: Path):
    done("compress", *tiny.options(tmp_path / "run"), "--ratio", 0.2)
    assert len(json.loads((tmp_path / "run" / "model" / "lowrank.json").read_text())["plans"]) > 1


def test_named_methods_try_nothing(tiny: Tiny, tmp_path: Path):
    done("compress", *tiny.options(tmp_path / "run", method="kfac"), "--ratio", 0.5, "--no-second")
    assert json.loads((tmp_path / "run" / "model" / "lowrank.json").read_text())["plans"] == []


@pytest.mark.slow
@pytest.mark.assets
@pytest.mark.parametrize("ratio", [0.3, 0.7])
def test_auto_with_few_tokens_holds_against_named_methods(assets: Path, tmp_path: Path, ratio: float):
    text, found = assets / "text", {}
    for method in ("svd-llm", "modegpt", "auto"):
        out = tmp_path / method
        done("compress", assets / "models" / "stories260k-llama-gqa", "--calibration",
             text / "tinystories-calibration.txt", "--samples", 2, "--seq-len", 64, "--ratio", ratio, "--method",
             method, "--out", out)  # fmt: skip
        said = done("eval", out / "model", "--perplexity", text / "tinystories-dev.txt", "--seq-len", 256, "--limit",
                    24, "--json")  # fmt: skip
        (values,) = said.json["perplexity"].values()
        found[method] = values["compressed"]
    assert found["auto"] < 0.7 * min(found["svd-llm"], found["modegpt"])


@pytest.mark.parametrize(("samples", "method", "drawn"), [(8, "auto", 3), (400, "auto", 0), (8, "modegpt", 0)])
def test_random_tokens_stand_beside_little_text_alone(samples: int, method: str, drawn: int, tiny: Tiny) -> None:
    recipe = Recipe(model=str(tiny.model), calibration=str(tiny.text), samples=samples, seq_len=32, method=method)
    plan = make_plan(recipe)
    assert plan.calibrate.drawn == drawn
    assert plan.refine is None or plan.refine.drawn == drawn


def test_of_large_models_few_plans_are_tried_on_few_tokens(halved: Path, tiny: Tiny, monkeypatch: pytest.MonkeyPatch):
    recipe = dict(model=str(tiny.model), calibration=str(tiny.text), samples=8, seq_len=32, ratio=0.5)
    plan = make_plan(Recipe(**recipe))  # pyright: ignore[reportArgumentType]
    run = Run(halved)
    bases = Bases(plan.chooser, pipeline.inputs_of_score(plan, run).calibration.id, run.scores)
    bases.rival = None
    monkeypatch.setattr(bases, "scales", dict)  # their plan stands apart
    many = choice.plans_of(bases)
    monkeypatch.setattr("lowrank_compress.stages.choose.SMALL", 8)
    monkeypatch.setattr(choice, "HOPELESS", float("inf"))
    few = choice.plans_of(bases)
    assert len(many) > len(few) == 1 + choice.RIVALS
    assert few[0].choices == many[0].choices
    others = sorted(plan.predicted for plan in many[1:])
    assert [plan.predicted for plan in few[1:]] == others[: choice.RIVALS]
    assert few_tokens(plan.checkpoint) == 8192
    elements = sum(math.prod(stored.shape) for stored in plan.checkpoint.tensors.values())
    monkeypatch.setattr(samples, "TRIED_PRODUCTS", 3000 * elements)
    assert few_tokens(plan.checkpoint) == 3000
    monkeypatch.setattr(samples, "TRIED_PRODUCTS", elements)
    assert few_tokens(plan.checkpoint) == 2048
