"""Measured losses: each trial is a plan of its own, its cost is known before, and what was measured is found again."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lowrank_compress.allocation import loss
from lowrank_compress.allocation.measured import SHARES, corrected, correction, point_at
from lowrank_compress.artifacts.tensors import BlockFiles
from lowrank_compress.model.skeleton import Skeleton
from lowrank_compress.model.walk.replay import Replay
from lowrank_compress.recipe import Recipe
from lowrank_compress.resources.resources import Resources
from lowrank_compress.stages import choice, measured, pipeline
from lowrank_compress.stages.decompose import Bases
from lowrank_compress.stages.plan import Plan, make_plan
from lowrank_compress.stages.run import Run
from lowrank_compress.stages.samples import calibration_batches
from tests.runs import Tiny, done, forked, refused, results

ARGUMENTS = ("--ratio", 0.4, "--allocate", "measured", "--no-refine", "--no-second")


@pytest.fixture(scope="module")
def once(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("measured") / "run"
    said = done("compress", *tiny.options(out), *ARGUMENTS)
    assert "Losses are measured by running the model" in said.text
    assert "over 256 tokens" in said.text
    assert "8192 tokens are better" in said.text
    return out


def planned(tiny: Tiny, **options: object) -> Plan:
    fields = {"model": str(tiny.model), "calibration": str(tiny.text), "samples": 8, "seq_len": 32, "ratio": 0.4}
    return make_plan(Recipe(**(fields | {"allocate": "measured", "second": False} | options)))  # pyright: ignore[reportArgumentType]


def first_plan(once: Path, plan: Plan) -> choice.Plan:
    bases = Bases(plan.chooser, pipeline.inputs_of_score(plan, Run(once)).calibration.id, Run(once).scores)
    return choice.plans_of(bases)[0]


def test_it_is_one_of_the_plans_and_nothing_is_left_of_it(once: Path) -> None:
    report = json.loads((once / "model" / "lowrank.json").read_text())
    totals = {entry["plan"]: entry["divergence"] + choice.FAR * entry["at_random"] for entry in report["plans"]}
    assert measured.NAME in totals
    assert report["plan"] == min(totals, key=totals.__getitem__)
    assert not list((once / "scores").glob("measured-*"))


@pytest.mark.parametrize("large", [False, True])
def test_trials_are_whole_plans_and_cost_what_was_said(
    once: Path, tiny: Tiny, monkeypatch: pytest.MonkeyPatch, large: bool
) -> None:
    """Against each plan tried by itself, from the first block on."""
    monkeypatch.setattr("lowrank_compress.stages.choose.SMALL", 8 if large else 512)
    plan = planned(tiny)
    first = first_plan(once, plan)
    curves = first.bases.curves()
    batches = calibration_batches(plan.calibrate, plan.checkpoint, "lm")
    dense = Skeleton(plan.checkpoint, torch.device("cpu"), torch.float32)
    runs, step = 0, Replay.step

    def counting(self: Replay, index: int, *given: object) -> torch.Tensor:
        nonlocal runs
        runs += 1
        return step(self, index, *given)  # pyright: ignore[reportArgumentType]

    for block in (0, 1):
        trials = measured.trials_of(first, curves, block)
        units = list(dict.fromkeys(trial.unit for trial in trials))
        assert len(trials) == len(units) * (len(SHARES) + 1)
        assert (units == [f"{block}/{name}" for name in ("qk", "vo", "mlp")]) == large
        with monkeypatch.context() as patched:
            patched.setattr(Replay, "step", counting)
            runs = 0
            found = measured._measured(first, trials, batches, Resources())
        assert runs / len(batches) / 2 == pytest.approx(measured.cost({block: len(trials)}, 2))
        expected = choice.divergences(dense, batches, [trial.plan for trial in trials])
        assert torch.cat([found[unit] for unit in units]).tolist() == pytest.approx(expected, rel=1e-4)
        assert len(set(expected)) > 2
        assert all(trial.plan.groups == first.groups for trial in trials)


@pytest.mark.slow
def test_points_are_chosen_by_what_was_measured(once: Path, tiny: Tiny) -> None:
    """Against corrections that are made here, of plans tried one by one."""
    plan = planned(tiny)
    first = first_plan(once, plan)
    found = measured.measured_plan(first, plan.calibrate, _Quiet(), resources=Resources())
    curves, dense = first.bases.curves(), Skeleton(plan.checkpoint, torch.device("cpu"), torch.float32)
    batches = calibration_batches(plan.calibrate, plan.checkpoint, "lm")
    better = []
    for group in first.groups:
        curve, values = curves[group.name], []
        points = [*(point_at(curve, share) for share in SHARES), len(curve) - 1]
        for point in points:
            trial = replace(first, choices=dict(first.choices) | {group.name: curve.choice(point)})
            values += choice.divergences(dense, batches, [trial])
        factors = {
            curve.stored[point] / curve.dense: correction(value - values[-1], float(curve.loss[point]))
            for point, value in zip(points[:-1], values, strict=False)
        }
        better.append(corrected(curve, factors))
    chosen = loss.allocate(better, plan.chooser.budget.limit)
    expected = {curve.name: curve.choice(point) for curve, point in zip(better, chosen, strict=True)}
    assert found.choices == expected
    assert found.choices != first.choices


class _Quiet:
    def advance(self, step: str, done: int, total: int) -> None:
        pass

    def warn(self, text: str) -> None:
        pass


@pytest.mark.slow
def test_killed_and_resumed_it_gives_the_same_bytes(once: Path, tiny: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "run"
    write = BlockFiles.write

    def work() -> None:
        def dying(self: BlockFiles, block: int, *given: object, **more: object) -> None:
            if self.prefix == "measured" and block == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            write(self, block, *given, **more)  # pyright: ignore[reportArgumentType]

        BlockFiles.write = dying  # pyright: ignore[reportAttributeAccessIssue]
        done("compress", *tiny.options(out), *ARGUMENTS)

    assert forked(work) == -signal.SIGKILL
    assert len(list((out / "scores").glob("measured-*"))) == 1
    said = done("compress", *tiny.options(out), *ARGUMENTS)
    assert "changes of 1 blocks" in said.text
    assert results(out) == results(once)


def test_a_named_method_takes_it_untried(tiny: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "run"
    done("compress", *tiny.options(out, "svd-llm"), "--ratio", 0.4, "--allocate", "measured")
    report = json.loads((out / "model" / "lowrank.json").read_text())
    assert report["plan"] == measured.NAME
    assert report["plans"] == []


def test_a_dry_run_says_what_it_will_cost(tiny: Tiny, tmp_path: Path) -> None:
    said = done("compress", *tiny.options(tmp_path / "run"), *ARGUMENTS, "--dry-run", "--json").json["measured"]
    # Of each of two blocks seven matrices, at four shares and dense.
    assert said == {"changes": 70, "passes": 2 + 35 + (1 + 35) / 2, "tokens": 256}
    shown = done("compress", *tiny.options(tmp_path / "run"), *ARGUMENTS, "--dry-run").out
    assert "running the model up to 55 times" in " ".join(shown.split())


def test_methods_without_data_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    message = refused("compress", *tiny.options(tmp_path / "run", "svd"), "--allocate", "measured")
    assert "'measured' needs calibration data, which none of the methods takes" in message
