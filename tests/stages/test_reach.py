"""Which ratios can be reached is known before any work: the dry run accepts what succeeds, and nothing else."""

import re
from pathlib import Path

import pytest

from lowrank_compress.allocation.table import ALLOCATORS
from lowrank_compress.methods.experts import ExpertMethod
from lowrank_compress.methods.table import METHODS
from tests.runs import Tiny, done, lrc, refused

CASES: list[list[object]] = [
    *(["--method", name] for name, method in METHODS.items() if not isinstance(method, ExpertMethod)),
    *(["--method", "kfac", "--allocate", name] for name in ALLOCATORS),
    *(["--method", "kfac", "--storage", name] for name in ("pair", "pivot", "auto")),
    ["--method", "modegpt", "--cap", 0.5],
    ["--method", "modegpt", "--cap", 1],
    ["--method", "modegpt", "--metric", "kfac", "--allocate", "loss", "--floor", 0.5],
    ["--method", "kfac", "--allocate", "block-influence", "--cap", 0.33, "--temperature", 0.01],
    ["--method", "auto", "--round-to", 16],
    ["--method", "auto", "--ratio-of", "model"],
    ["--method", "auto", "--vo", "kfac|vo-svd", "--floor", 1],
    ["--method", "auto", "--vo", "kfac|vo-svd", "--qk", "dense", "--ratio-of", "model", "--round-to", 4],
    ["--method", "nystrom", "--round-to", 24, "--cap", 0.4],
    ["--method", "svd", "--attention", "dense"],
]


def with_ratio(tiny: Tiny, run: Path, options: list[object], ratio: float) -> list[object]:
    return ["compress", *tiny.options(run)[:1], *tiny.options(run)[3:], *options, "--ratio", f"{ratio:.4f}"]


@pytest.mark.parametrize("options", CASES, ids=lambda options: " ".join(map(str, options)))
def test_the_dry_run_accepts_what_succeeds_and_nothing_else(tiny: Tiny, tmp_path: Path, options: list[object]):
    run = tmp_path / "run"
    said = refused(*with_ratio(tiny, run, options, 0.9999), "--dry-run")
    largest = float(re.findall(r"The largest reachable ratio is (0\.\d+)", said)[0])
    assert refused(*with_ratio(tiny, run, options, 0.9999)) == said
    over = with_ratio(tiny, run, options, largest + 2e-4)
    assert refused(*over, "--dry-run") == refused(*over)
    assert not run.exists()

    done(*with_ratio(tiny, run, options, largest), "--dry-run")
    found = done(*with_ratio(tiny, run, options, largest), "--json").json
    assert found["reached_ratio"] >= largest


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "modegpt", "--ratio", 0.85], "--cap 0.8 is in the way, with --cap 1 it is 0.9"),
        (
            ["--method", "svd", "--round-to", 64, "--ratio", 0.3],
            "Nothing can go. Change the options; or: --round-to 64 is in the way",
        ),
        (["--method", "svd", "--round-to", 12, "--ratio", 0.5], "with --round-to 1 it is 0.9"),
        (["--method", "svd", "--mlp", "dense", "--ratio", 0.5], "give them a method by --mlp"),
        (["--method", "cr", "--ratio", 0.5], "give them a method by --vo and --mlp"),
        (["--method", "svd", "--ratio", 0.9, "--ratio-of", "model"], "--ratio-of blocks leaves them out"),
    ],
)
def test_the_option_that_stands_in_the_way_is_named(tiny: Tiny, tmp_path: Path, options: list, message: str):
    command = ["compress", tiny.model, "--calibration", tiny.text, "--out", tmp_path / "run", *options]
    said = refused(*command)
    assert message in said
    assert "more of the model" not in said
    for name, value in re.findall(r"with (--[a-z-]+) ([\d.]+) it is", said):
        larger = float(re.findall(rf"with {name} {value} it is (0\.\d+)", said)[0])
        done(*command[:-2] if "--ratio" in command[-2:] else command, name, value, "--ratio", larger, "--dry-run")


def test_auto_reaches_what_its_alternatives_reach(tiny: Tiny, tmp_path: Path):
    """One hidden unit that is left stores less than three matrices of rank 1, which are the first alternative."""
    largest = {}
    for mlp in ("kfac", "kfac|nystrom"):
        said = lrc("compress", *tiny.options(tmp_path / "run"), "--mlp", mlp, "--ratio", 0.9999, "--dry-run").text
        largest[mlp] = float(re.findall(r"ratio is (0\.\d+)", said)[0])
    assert largest["kfac|nystrom"] > largest["kfac"]


def test_an_edit_of_the_ranks_outlives_a_ratio_out_of_reach(tiny: Tiny, tmp_path: Path):
    run = tmp_path / "run"
    done("compress", *tiny.options(run, "svd"))
    ranks = run / "scores" / "ranks.json"
    ranks.write_text(ranks.read_text() + "\n")
    edited = ranks.read_bytes()
    refused("score", run, "--ratio", 0.99, "--overwrite")
    assert ranks.read_bytes() == edited
    assert not (run / "scores" / "ranks.json.bak").exists()
