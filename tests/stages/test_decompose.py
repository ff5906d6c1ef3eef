"""Statistics become bases that are found again, and nothing that has served is held."""

from __future__ import annotations

from pathlib import Path

import torch

from lowrank_compress.artifacts.manifest import read_manifest
from lowrank_compress.artifacts.tensors import BlockFiles
from lowrank_compress.calibration.statistics import INFLUENCE
from lowrank_compress.recipe import Recipe
from lowrank_compress.stages.decompose import Bases
from lowrank_compress.stages.plan import make_plan
from lowrank_compress.stages.run import Run
from tests.runs import Tiny, done


def bases_for(tiny: Tiny, place: Path, calibration: str = "calibration", **options: object) -> Bases:
    recipe = {"model": str(tiny.model), "calibration": str(tiny.text), "samples": 8, "seq_len": 32} | options
    return Bases(make_plan(Recipe(**recipe)).chooser, calibration, place)  # pyright: ignore[reportArgumentType]


def statistics_for(tiny: Tiny, place: Path, method: str) -> dict[int, dict[str, torch.Tensor]]:
    run = Run(place / "run")
    done("calibrate", *tiny.options(run.path, method))
    manifest = read_manifest(run.statistics)
    assert manifest is not None
    files = BlockFiles(run.statistics, manifest.id)
    return {block: files.read(block) for block in (0, 1)}


def test_statistics_are_let_go_and_bases_are_found_again(tiny: Tiny, tmp_path: Path) -> None:
    place, means = tmp_path / "bases", statistics_for(tiny, tmp_path, "svd-llm")
    before = {block: set(found) for block, found in means.items()}
    bases = bases_for(tiny, place, method="svd-llm")
    bases.take(means)
    bases.flush()
    assert all(found.keys() == {INFLUENCE} < before[block] for block, found in means.items())
    again = bases_for(tiny, place, method="svd-llm")
    assert [again.finished(block) for block in (0, 1)] == [True, True]
    assert {path.name for path in place.iterdir()} == set(again.names([0, 1]))
    assert again.curves().keys() == {group.name for group in again.chooser.groups}
    assert not again.halved()
    assert not bases_for(tiny, place, "another", method="svd-llm").finished(0)


def test_a_block_is_finished_with_the_rival_s(tiny: Tiny, tmp_path: Path) -> None:
    means = statistics_for(tiny, tmp_path, "auto")
    bases = bases_for(tiny, tmp_path / "bases", method="auto")
    assert bases.rival is not None
    bases.take({1: means[1]})
    bases.flush()
    assert bases.finished(1)
    assert not bases.finished(0)
    bases.rival.files.path(1).unlink()
    assert not bases.finished(1)
    assert bases.names([0]) == [bases.files.name(0), bases.rival.files.name(0)]


def test_singular_values_are_kept_where_the_allocator_looks_at_them(tiny: Tiny, tmp_path: Path) -> None:
    bases = bases_for(tiny, tmp_path, method="svd", allocate="welore")
    assert bases.spectra is not None
    bases.take_spectra([0])
    before = bases.spectra.path(0).stat().st_mtime_ns
    bases.take_spectra([0, 1])
    assert bases.spectra.path(0).stat().st_mtime_ns == before
    group = bases.chooser.of_block(1)[0]
    weight = bases.chooser.subject.model.weight(group.targets[0]).double()
    found = bases.spectra.read(1)[f"{group.name}/singular_values"]
    torch.testing.assert_close(found, torch.linalg.svdvals(weight), rtol=0, atol=1e-6 * float(weight.norm()))
    without = bases_for(tiny, tmp_path / "other", method="svd")
    without.take_spectra([0])
    assert without.spectra is None
    assert not (tmp_path / "other").exists()
