"""The second allocation: another plan beside the first ones, found again after any interruption."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lowrank_compress.artifacts.manifest import read_manifest
from lowrank_compress.artifacts.tensors import BlockFiles
from lowrank_compress.calibration.again import Again
from lowrank_compress.calibration.capture import capture
from lowrank_compress.methods.groups import needed
from lowrank_compress.model.skeleton import Skeleton
from lowrank_compress.recipe import Recipe
from lowrank_compress.stages import choice, pipeline, second
from lowrank_compress.stages.decompose import Bases
from lowrank_compress.stages.plan import Plan, make_plan
from lowrank_compress.stages.reporting import Silent
from lowrank_compress.stages.run import Run
from lowrank_compress.stages.samples import calibration_batches, with_drawn
from tests.runs import Tiny, done, forked, refused, results

ARGUMENTS = ("--ratio", 0.4, "--no-refine")


@pytest.fixture(scope="module")
def once(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("second") / "run"
    done("compress", *tiny.options(out), *ARGUMENTS, "--second")
    return out


def planned(tiny: Tiny, **options: object) -> Plan:
    fields = {"model": str(tiny.model), "calibration": str(tiny.text), "samples": 8, "seq_len": 32, "ratio": 0.4}
    return make_plan(Recipe(**(fields | options)))  # pyright: ignore[reportArgumentType]


def test_it_is_one_of_the_plans_and_the_report_says_what_it_came_to(once: Path) -> None:
    report = json.loads((once / "model" / "lowrank.json").read_text())
    totals = {entry["plan"]: entry["divergence"] + choice.FAR * entry["at_random"] for entry in report["plans"]}
    assert choice.SECOND in totals
    assert report["plan"] == min(totals, key=totals.__getitem__)
    scores = read_manifest(once / "scores")
    assert scores is not None
    kept = any(name.startswith("second-") for name in scores.outputs)
    assert kept == (report["plan"] == choice.SECOND) == bool(list((once / "scores").glob("second-*")))
    assert f"Plan {choice.SECOND}" in done("show", once).out


def test_its_bases_are_those_of_both_fisher_matrices(once: Path, tiny: Tiny, tmp_path: Path) -> None:
    """Against statistics that are taken and put together here, and decomposed as ordinary ones are."""
    plan, run = planned(tiny), Run(once)
    calibration = pipeline.inputs_of_score(plan, run).calibration.id
    bases = Bases(plan.chooser, calibration, run.scores)
    first = choice.plans_of(bases)[0]
    # Elsewhere, so that nothing is found there.
    elsewhere = Bases(plan.chooser, calibration, tmp_path)
    for block in (0, 1):
        elsewhere.files.write(block, bases.files.read(block))
    found = second.second_bases(replace(first, bases=elsewhere), plan.calibrate, Silent(), resources=bases._resources)
    narrowed = frozenset(
        target.name
        for group in first.groups
        if first.choices[group.name].format == "width"
        for target in group.targets
        if target.role in ("gate", "up")
    )
    again = Again(choice.edited(first), narrowed, plan.calibrate.seed)
    dense = Skeleton(plan.checkpoint, torch.device("cpu"), torch.float32)
    batches = calibration_batches(plan.calibrate, plan.checkpoint, "lm")
    batches = with_drawn(batches, plan.calibrate.drawn, plan.checkpoint, "lm")
    slow = Bases(plan.chooser, "slow", tmp_path / "slow")
    slow.rival = None
    taken = capture(dense, batches, needed(plan.subject.groups), skip=lambda block: False, halves=True, again=again)
    slow.take({statistics.block: statistics.means for statistics in taken})
    slow.flush()
    for block in (0, 1):
        expected, got = slow.files.read(block), found.files.read(block)
        assert expected.keys() == got.keys()
        assert all(torch.equal(got[name], expected[name]) for name in expected)
        assert any(not torch.equal(got[name], tensor) for name, tensor in bases.files.read(block).items())


@pytest.mark.slow
@pytest.mark.parametrize("written", [0, 1], ids=["before a block", "between blocks"])
def test_killed_and_resumed_it_gives_the_same_bytes(once: Path, tiny: Tiny, tmp_path: Path, written: int) -> None:
    out = tmp_path / "run"
    write = BlockFiles.write

    def work() -> None:
        count = 0

        def dying(self: BlockFiles, *given: object, **more: object) -> None:
            nonlocal count
            if self.prefix == "second":
                if count == written:
                    os.kill(os.getpid(), signal.SIGKILL)
                count += 1
            write(self, *given, **more)  # pyright: ignore[reportArgumentType]

        BlockFiles.write = dying  # pyright: ignore[reportAttributeAccessIssue]
        done("compress", *tiny.options(out), *ARGUMENTS, "--second")

    assert forked(work) == -signal.SIGKILL
    assert len(list((out / "scores").glob("second-*"))) == written
    done("compress", *tiny.options(out), *ARGUMENTS, "--second")
    assert results(out) == results(once)


def test_scales_are_those_of_the_traces_of_both_fisher_matrices(once: Path, tiny: Tiny) -> None:
    plan, run = planned(tiny), Run(once)
    bases = Bases(plan.chooser, pipeline.inputs_of_score(plan, run).calibration.id, run.scores)
    first = choice.plans_of(bases)[0]
    found = second.scales(first, plan.calibrate, Silent(), resources=bases._resources)
    narrowed = second._narrowed(first)
    assert narrowed
    again = Again(choice.edited(first), narrowed, plan.calibrate.seed)
    dense = Skeleton(plan.checkpoint, torch.device("cpu"), torch.float32)
    batches = calibration_batches(plan.calibrate, plan.checkpoint, "lm")
    wanted = {target.name: frozenset({"out_square"}) for target in plan.subject.resolved.targets}
    either: list[dict[str, torch.Tensor]] = []
    for how in (None, again):
        captured = capture(dense, batches, wanted, skip=lambda block: False, again=how)
        either.append({name: mean for block in captured for name, mean in block.means.items()})
    for group in plan.subject.groups:
        (target,) = group.targets if len(group.targets) == 1 else [t for t in group.targets if t.role == "down"]
        before, both = (each[f"{target.name}/out_square"].sum().item() for each in either)
        assert found[group.name] == pytest.approx(both / before, rel=1e-6)
    assert any(abs(scale - 1) > 0.01 for scale in found.values())


def test_scaled_losses_are_a_plan_that_needs_no_other_bases(once: Path, tiny: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "run"
    done("compress", *tiny.options(out), *ARGUMENTS, "--second-by", "scales")
    report = json.loads((out / "model" / "lowrank.json").read_text())
    names = [entry["plan"] for entry in report["plans"]]
    assert choice.SCALED in names
    assert choice.SECOND not in names
    assert not list((out / "scores").glob("second-*"))
    before = results(out)
    done("compress", *tiny.options(out), *ARGUMENTS, "--second-by", "scales")
    assert results(out) == before


def test_losses_times_the_same_number_choose_the_same(once: Path, tiny: Tiny) -> None:
    plan, run = planned(tiny), Run(once)
    bases = Bases(plan.chooser, pipeline.inputs_of_score(plan, run).calibration.id, run.scores)
    first = choice.plans_of(bases)[0]
    doubled = choice.scaled_plan(bases, {group.name: 2.0 for group in plan.subject.groups})
    assert doubled.choices == first.choices
    assert doubled.predicted == pytest.approx(2 * first.predicted)
    single = [group.name for group in first.groups if len(group.targets) == 1]
    dear = next(name for name in single if not first.choices[name].is_dense)
    scales = {group.name: 1e4 if group.name == dear else 1.0 for group in plan.subject.groups}
    changed = choice.scaled_plan(bases, scales).choices
    assert changed[dear].is_dense or changed[dear].parameters > first.choices[dear].parameters


def test_large_models_are_scaled(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    assert planned(tiny).score.second_by == "full"
    monkeypatch.setattr("lowrank_compress.stages.plan.SMALL", 8)
    assert planned(tiny).score.second_by == "scales"
    assert planned(tiny, second_by="full").score.second_by == "full"


def test_where_it_is_not_asked_for_nothing_is_tried(tiny: Tiny) -> None:
    assert planned(tiny).score.second
    assert not planned(tiny, second=False).score.second
    assert not planned(tiny, ratio=0.2).score.second
    assert planned(tiny, ratio=0.2, second=True).score.second
    assert not planned(tiny, method="kfac", allocate="loss").score.second
    assert not planned(tiny, methods={"q": "svd-llm"}, allocate="uniform").score.second


def test_it_is_refused_where_plans_are_not_compared(tiny: Tiny, tmp_path: Path) -> None:
    message = refused("compress", *tiny.options(tmp_path / "run", "svd-llm"), "--second")
    assert "--second compares plans by predicted losses" in message
