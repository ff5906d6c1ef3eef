"""Sweeps: ordinary runs with the bytes of `lrc compress`, and nothing computed twice."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

import lowrank_compress
from lowrank_compress.errors import InputError
from lowrank_compress.stages import calibrate, evaluate, refine, sweep
from lowrank_compress.stages.sweepconfig import make_sweep
from tests.runs import Tiny, block_file, done, forked, lrc, refused, results, times
from tests.stages.test_workers import ended, start

NAMED = "kfac-allocate=loss-storage=pivot"
METHODS = ["svd-llm", {"method": "kfac", "allocate": "loss", "storage": "pivot"}]


def written(tiny: Tiny, place: Path, **more: Any) -> Path:
    """The file of a sweep."""
    fields = {
        "model": str(tiny.model),
        "methods": METHODS,
        "ratios": [0.2, 0.3],
        "calibrations": [str(tiny.text)],
        "options": {"samples": 8, "seq_len": 32},
        "evaluate": {"perplexity": str(tiny.heldout)},
    }
    file = place / "grid.yaml"
    file.write_text(yaml.safe_dump(fields | more))
    return file


def counted(monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> list[Any]:
    """Count the calls of a function."""
    calls, real = [], getattr(module, name)

    def call(*args: Any, **options: Any) -> Any:
        calls.append(args)
        return real(*args, **options)

    monkeypatch.setattr(module, name, call)
    return calls


@pytest.fixture(scope="module")
def swept(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of two methods at two ratios: one calibration of each, and one look at the dense model."""
    place = tmp_path_factory.mktemp("swept")
    with pytest.MonkeyPatch.context() as patch:
        captured = counted(patch, calibrate, "capture")
        looked = counted(patch, evaluate, "_measure")
        done("sweep", written(tiny, place), "--out", place / "out", "--no-report")
    assert len(captured) == 2
    assert [args[2] for args in looked].count("dense") == 1
    assert [args[2] for args in looked].count("compressed") == 4
    return place / "out"


def test_the_bytes_are_those_of_single_runs(swept: Path, tiny: Tiny, tmp_path: Path) -> None:
    names = [
        "svd-llm-0.2",
        "svd-llm-0.3",
        "kfac-allocate=loss-storage=pivot-0.2",
        "kfac-allocate=loss-storage=pivot-0.3",
    ]
    assert sorted(path.name for path in (swept / "runs").iterdir()) == sorted(names)
    assert not (swept / "statistics").exists()
    for name, options in ((names[1], []), (names[2], ["--allocate", "loss", "--storage", "pivot", "--ratio", 0.2])):
        method = name.partition("-0")[0].partition("-allocate")[0]
        done("compress", *tiny.options(tmp_path / name, method), *options)
        assert results(swept / "runs" / name) == results(tmp_path / name)
        assert done("verify", swept / "runs" / name, "--json").json["ok"]
    # The ratios' bases are the same: the second run has those of the first.
    one, other = (block_file(swept / "runs" / name / "scores", "basis", 1) for name in names[2:])
    assert one.samefile(other)


def test_the_table_and_the_same_again(swept: Path, tiny: Tiny) -> None:
    before = {name: at for name, at in times(swept).items() if "lock" not in name and name != "sweep.json"}
    found = done("sweep", written(tiny, swept.parent), "--out", swept, "--no-report", "--json").json
    assert {name: at for name, at in times(swept).items() if name in before} == before
    assert [(row["label"], row["ratio"], row["state"]) for row in found["rows"]] == [
        (label, ratio, "finished") for label in ("svd-llm", "kfac allocate=loss storage=pivot") for ratio in (0.2, 0.3)
    ]
    for row in found["rows"]:
        measured = done("eval", row["run"], "--perplexity", tiny.heldout, "--json").json
        assert row["measured"] == measured
        assert row["reached_ratio"] >= row["asked_ratio"]
    said = done("sweep", swept.parent / "grid.yaml", "--out", swept, "--no-report").out
    assert "svd-llm-0.3" in said
    assert "perplexity · heldout.txt" in said
    assert "dense" in said


@pytest.mark.slow
def test_what_fails_is_listed_and_what_is_added_is_made(
    swept: Path, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    shutil.copytree(swept, out)
    captured = counted(monkeypatch, calibrate, "capture")
    file = written(tiny, tmp_path, methods=["svd", *METHODS], ratios=[0.2, 0.25, 0.999])
    said = lrc("sweep", file, "--out", out)
    assert said.code == 2
    assert "3 of 9 runs failed (svd-0.999, svd-llm-0.999, kfac-allocate=loss-storage=pivot-0.999)" in said.text
    assert "largest reachable ratio" in said.text
    assert "svd-0.25" in said.out
    # svd-llm at 0.25 keeps other ranks than before; the bases of kfac serve any ratio.
    assert len(captured) == 1
    rows = lrc("sweep", file, "--out", out, "--no-report", "--json").json["rows"]
    assert [row["state"] for row in rows] == ["finished", "finished", "failed"] * 3
    page = (out / "report.html").read_text()
    assert "6 runs" in page
    assert "svd-llm-0.25" in page


def test_other_axes_have_names(tiny: Tiny, tmp_path: Path) -> None:
    grid = make_sweep(
        {"model": "m", "methods": ["svd"], "seeds": [0, 1], "calibrations": ["a/one.txt", "two.txt"], "ratios": [0.5]},
        "here",
    )
    points = grid.points("here")
    assert [point.name for point in points] == [
        f"svd-0.5-seed{seed}-{text}" for text in ("one", "two") for seed in (0, 1)
    ]
    assert [(point.recipe.seed, point.recipe.calibration) for point in points][:3] == [
        (0, "a/one.txt"),
        (1, "a/one.txt"),
        (0, "two.txt"),
    ]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"method": ["svd"]}, "unknown option 'method'; known are model, methods, ratios"),
        ({"methods": []}, "methods"),
        ({"methods": [{"storage": "pair"}]}, "names no method"),
        ({"methods": ["svd", "svd"]}, "2 combinations are called svd-0.2"),
        ({"options": {"seed": 1}}, "options names 'seed', which is an axis of the sweep"),
        ({"options": {"sample": 1}}, "unknown option 'sample'"),
        ({"evaluate": {"text": "a"}}, "unknown option 'text'"),
    ],
)
def test_what_is_no_sweep(more: dict[str, Any], message: str, tiny: Tiny, tmp_path: Path) -> None:
    assert message in refused("sweep", written(tiny, tmp_path, **more), "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_directories_are_left_alone(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("mine")
    file = written(tiny, tmp_path)
    assert "is not empty and holds no sweep" in refused("sweep", file, "--out", tmp_path / "thesis")
    assert "is a file" in refused("sweep", file, "--out", file)
    with pytest.raises(InputError, match="does not exist"):
        lowrank_compress.sweep(tmp_path / "none.yaml", tmp_path / "out")


def test_the_calibration_text_is_no_measure(tiny: Tiny, tmp_path: Path) -> None:
    fields = yaml.safe_load(written(tiny, tmp_path).read_text())
    fields |= {"methods": ["svd-llm"], "ratios": [0.3], "evaluate": {"perplexity": str(tiny.text)}}
    (row,) = lowrank_compress.sweep(fields, tmp_path / "out")["rows"]
    assert row["state"] == "failed"
    assert "is the text that this run was calibrated on" in row["problem"]


def test_what_is_refined_knows_gradients(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    again, captured = counted(monkeypatch, refine, "capture"), counted(monkeypatch, calibrate, "capture")
    file = written(tiny, tmp_path, methods=["auto"], evaluate={})
    done("sweep", file, "--out", tmp_path / "out", "--no-report")
    assert (len(captured), again) == (1, [])
    for ratio in (0.2, 0.3):
        alone = tmp_path / f"{ratio}"
        done("compress", *tiny.options(alone), "--ratio", ratio)
        assert results(tmp_path / "out" / "runs" / f"auto-{ratio}") == results(alone)


@pytest.mark.slow
def test_two_processes_have_a_share_each(
    swept: Path, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every run is made once, by the process that has its calibration; a failure is told by the first."""
    made, real = tmp_path / "made", sweep._make
    made.mkdir()

    def make(job: sweep.Job, *rest: Any) -> None:
        with (made / job.point.name).open("a") as file:
            file.write(os.environ["RANK"])
        if job.point.name == "svd-0.3":
            raise KeyError("a fault of ours")
        real(job, *rest)

    monkeypatch.setattr(sweep, "_make", make)
    file, out = written(tiny, tmp_path, methods=["svd", *METHODS]), tmp_path / "out"
    assert ended(start(2, "sweep", file, "--out", out, "--no-report", "--json")) == [2, 0]
    by = {path.name: path.read_text() for path in made.iterdir()}
    assert len(by) == 6
    assert sorted(by.values()) == ["0"] * 4 + ["1"] * 2
    assert all(by[f"{name}-0.2"] == by[f"{name}-0.3"] for name in ("svd", "svd-llm"))
    rows = {row["name"]: row for row in json.loads((out / "sweep.json").read_text())["rows"]}
    assert list(rows) == [f"{name}-{ratio}" for name in ("svd", "svd-llm", NAMED) for ratio in (0.2, 0.3)]
    assert [name for name, row in rows.items() if row["state"] == "failed"] == ["svd-0.3"]
    assert rows["svd-0.3"]["problem"] == "KeyError: 'a fault of ours'"
    for path in (swept / "runs").iterdir():
        # Manifests say how many processes there were.
        one, other = (
            {n: d for n, d in results(run).items() if "manifest" not in n} for run in (path, out / "runs" / path.name)
        )
        assert one == other
    assert not (out / "statistics").exists()


def test_after_a_kill_the_same_command_ends_in_the_same_bytes(swept: Path, tiny: Tiny, tmp_path: Path) -> None:
    file, out, killed = written(tiny, tmp_path), tmp_path / "out", 0
    for seconds in (0.3, 0.8, 1.3):
        killed += forked(lambda: done("sweep", file, "--out", out, "--no-report"), kill_after=seconds) == -9
    assert killed > 0
    done("sweep", file, "--out", out, "--no-report")
    for path in (swept / "runs").iterdir():
        assert results(out / "runs" / path.name) == results(path)
    assert not (out / "statistics").exists()
