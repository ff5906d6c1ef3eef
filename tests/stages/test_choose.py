"""What may be chosen follows from shapes and options; what is chosen, from curves."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from lowrank_compress.allocation.curve import Curve, make_curve
from lowrank_compress.errors import InputError
from lowrank_compress.recipe import Recipe
from lowrank_compress.stages.choose import MUCH, Chooser
from lowrank_compress.stages.curves import lossless_curve, read_curves
from lowrank_compress.stages.decompose import bases_of
from lowrank_compress.stages.factorize import scores_manifest
from lowrank_compress.stages.plan import make_plan
from tests.runs import Tiny, done


def chooser_of(tiny: Tiny, **options: object) -> Chooser:
    recipe = {"model": str(tiny.model), "calibration": str(tiny.text), "samples": 8, "seq_len": 32} | options
    return make_plan(Recipe(**recipe)).chooser  # pyright: ignore[reportArgumentType]


def test_an_allocator_that_looks_at_nothing_keeps_what_it_chooses(tiny: Tiny) -> None:
    chooser = chooser_of(tiny, method="svd", ratio=0.5)
    curves = [lossless_curve(group, chooser.config) for group in chooser.groups]
    points = chooser.allocate(curves)
    chosen = {curve.name: curve.choice(point) for curve, point in zip(curves, points, strict=True)}
    assert chooser.keep == {name: choice.parameters[0] for name, choice in chosen.items()}
    assert sum(int(curve.stored[point]) for curve, point in zip(curves, points, strict=True)) <= chooser.budget.limit


def test_an_allocator_that_looks_at_losses_keeps_all_that_pays(tiny: Tiny) -> None:
    few, all_of_it = (chooser_of(tiny, method="svd", allocate=name) for name in ("uniform", "loss"))
    assert all(few.keep[group.name] < all_of_it.keep[group.name] for group in few.groups)


def test_a_ratio_out_of_reach_is_refused(tiny: Tiny) -> None:
    with pytest.raises(InputError, match=r"0\.999"):
        chooser_of(tiny, method="svd", ratio=0.999)


def test_only_losses_compare_candidates(tiny: Tiny) -> None:
    compared = chooser_of(tiny, method="auto")
    assert len(compared.groups) > len(chooser_of(tiny, method="auto", allocate="uniform").groups)
    candidates = compared.subject.candidates
    for position in (0, -1):
        better = {group.name for part in candidates for group in part.each[position]}
        curves = {
            group.name: _losing(group.name, compared, 1.0 if group.name in better else 2.0) for group in compared.groups
        }
        assert {group.name for group in compared.choose(curves)} == better


def _losing(name: str, chooser: Chooser, loss: float) -> Curve:
    group = next(group for group in chooser.groups if group.name == name)
    curve = lossless_curve(group, chooser.config)
    size = sum(target.elements for target in group.targets)
    # At half of its elements, and at all of them.
    half = int(np.searchsorted(curve.stored, size // 2))
    losses = np.where(np.arange(len(curve.choices)) >= half, loss, 1e9) * size
    return make_curve(name, size, curve.choices, losses, block=group.block)


def test_plans_are_held_against_a_rival_of_its_own_settings(tiny: Tiny) -> None:
    rival = chooser_of(tiny, method="auto", ratio=MUCH).rival
    assert rival is not None
    assert (rival.config.allocate, rival.config.storage, rival.config.held_out) == ("block-influence", "pair", False)
    assert rival.rival is None
    assert rival.subject.candidates != rival.subject.rival == ()
    assert chooser_of(tiny, method="kfac", ratio=MUCH).rival is None


def test_a_chooser_is_made_once(tiny: Tiny, tmp_path: Path) -> None:
    plan = make_plan(Recipe(model=str(tiny.model), method="svd"))
    assert plan.chooser is plan.chooser


def test_alternatives_share_a_unit_where_others_have_another(tiny: Tiny, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done("compress", *tiny.options(run), "--attention", "svd-llm", "--no-refine")
    chooser = chooser_of(tiny, method="auto", attention="svd-llm")
    assert not chooser.nats
    scores = scores_manifest(run / "scores")
    files = bases_of(run / "scores", scores)
    curves = read_curves(chooser.config, chooser.groups, files, yardsticks=chooser.yardsticks)
    parts = [part for part in chooser.subject.candidates if len(part.each) > 1]
    assert parts
    for part in parts:
        basis = files.read(part.each[0][0].block)
        totals = [float(group.total(basis)) for group in part.each[0]]
        unit = sum(totals) / len(totals)
        for group in (group for each in part.each for group in each):
            curve = curves[group.name]
            found = group.losses(basis, curve.choices)
            np.testing.assert_allclose(curve.loss[: len(found)] * unit, found, rtol=1e-12)
    # The others are shares of their own totals, as the report says of what was chosen, in the same units.
    report = json.loads((run / "model/lowrank.json").read_text())
    ranks = {group.name: entry for group in chooser.groups if (entry := report["matrices"].get(group.name))}
    assert len(ranks) == len(report["matrices"])
    for name, entry in ranks.items():
        curve = curves[name]
        if entry["rank"] is not None and entry["format"] in ("pair", "width"):
            at = np.searchsorted(curve.stored, entry["stored"])
            assert entry["predicted_loss"] == pytest.approx(curve.loss[at], rel=1e-9)
