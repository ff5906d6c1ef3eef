"""run.json: old ones are read, chains hold together, and nothing in one leads out of the run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lowrank_compress.artifacts.documents import read_sealed, write_sealed
from lowrank_compress.errors import ArtifactError
from lowrank_compress.stages.index import Index, Link, read_index, write_index
from tests.runs import Tiny, done, lrc, refused

Finished = Callable[[str], Path]
FIRST, SECOND, THIRD = (Link(stage, stage, stage * 2) for stage in "abc")
INDEX = Index("base", None, "id", (FIRST, SECOND, THIRD))


def in_schema_1(run: Path) -> None:
    """Make run.json what versions before the chain wrote."""
    found = read_sealed(run / "run.json")
    (link,) = found.pop("chain")
    old = {"schema": 1, "model": link["directory"]}
    old |= {name: found[name] for name in ("base", "revision", "base_id")} | {"id": link["id"]}
    write_sealed(run / "run.json", old)


def test_an_index_is_read_back_as_it_was_written(tmp_path: Path):
    write_index(tmp_path / "run.json", INDEX)
    assert read_index(tmp_path / "run.json") == INDEX


def test_a_link_takes_its_place_and_what_followed_another_result_goes():
    assert INDEX.before("b") == (FIRST,)
    assert INDEX.before("d") == INDEX.chain
    assert INDEX.extended(SECOND) == INDEX
    other = Link("b", "b", "other")
    assert INDEX.extended(other).chain == (FIRST, other)
    assert INDEX.extended(Link("d", "d", "id")).chain == (*INDEX.chain, Link("d", "d", "id"))


def test_a_run_of_an_older_version_goes_on(tiny: Tiny, finished: Finished):
    run = finished("svd")
    new = (run / "run.json").read_text()
    in_schema_1(run)
    old = (run / "run.json").read_text()
    assert json.loads(old)["schema"] == 1
    done("eval", run, "--perplexity", tiny.heldout)
    done("show", run)
    assert done("verify", run, "--json").json["ok"]
    assert (run / "run.json").read_text() == old
    done("factorize", run)
    assert (run / "run.json").read_text() == new
    in_schema_1(run)
    done("cast", run, "--dtype", "bfloat16")
    assert [link.stage for link in read_index(run / "run.json").chain] == ["factorize", "cast"]
    assert not (run / "run.json.bak").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"schema": 3},
        {"chain": []},
        {"chain": "model"},
        {"chain": [{"stage": "factorize", "directory": "model"}]},
        {"chain": [{"stage": "factorize", "directory": "model", "id": 1}]},
        {"chain": [{"stage": "factorize", "directory": "model", "id": "x", "more": 1}]},
        *(
            {"chain": [{"stage": "factorize", "directory": name, "id": "x"}]}
            for name in ("../a", "..", "", "/tmp", ".")
        ),
        {"chain": [{"stage": "factorize", "directory": name, "id": "x"} for name in ("model", "other")]},
        {"base": None},
        {"schema": 1},
        {"schema": 1, "model": "../a", "id": "x"},
    ],
    ids=str,
)
def test_a_damaged_index_is_refused(tmp_path: Path, changes: dict[str, Any]):
    write_index(tmp_path / "run.json", Index("base", None, "id", (FIRST,)))
    write_sealed(tmp_path / "run.json", read_sealed(tmp_path / "run.json") | changes)
    with pytest.raises(ArtifactError, match="is damaged or was written by another version of this program"):
        read_index(tmp_path / "run.json")


def test_a_directory_that_is_no_checkpoint_is_not_passed_off_as_one(finished: Finished):
    run = finished("svd")
    scores = json.loads((run / "scores" / "manifest.json").read_text())
    link = {"stage": "factorize", "directory": "scores", "id": scores["id"]}
    write_sealed(run / "run.json", read_sealed(run / "run.json") | {"chain": [link]})
    assert "scores is not the checkpoint that run.json names" in refused("show", run)
    assert lrc("verify", run).code == 2
