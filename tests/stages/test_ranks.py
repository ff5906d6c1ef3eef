"""ranks.json may be edited by hand: the edit is an input, it is kept, and never lost silently."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.runs import Tiny, contents, done, lrc, refused

Finished = Callable[[str], Path]
NAME = "model.layers.1.self_attn.o_proj"


def edit(run: Path, change: Callable[[dict], None]) -> str:
    path = run / "scores" / "ranks.json"
    ranks = json.loads(path.read_text())
    change(ranks["matrices"])
    path.write_text(json.dumps(ranks))
    return path.read_text()


def lower(matrices: dict) -> None:
    matrices[NAME] |= {"format": "pair", "rank": 5}


def stored(run: Path) -> dict:
    return json.loads((run / "model" / "lowrank.json").read_text())["matrices"]


def states(run: Path) -> dict[str, str]:
    return {entry["file"]: entry["state"] for entry in done("verify", run, "--json").json["files"]}


def test_an_edit_is_used_kept_and_told_from_damage(tiny: Tiny, finished: Finished):
    run = finished("auto")
    others = {name: matrix for name, matrix in stored(run).items() if name != NAME}
    edited = edit(run, lower)
    assert states(run)["scores/ranks.json"] == "edited by hand"

    before = contents(run / "model")
    for command in (["factorize", run], ["compress", *tiny.options(run)]):
        message = refused(*command)
        assert "made from other ranks than" in message
        assert "--overwrite" in message
        assert contents(run / "model") == before

    done("factorize", run, "--overwrite")
    assert (stored(run)[NAME]["format"], stored(run)[NAME]["rank"]) == ("pair", 5)
    assert {name: matrix for name, matrix in stored(run).items() if name != NAME} == others
    again = contents(run / "model")
    done("compress", *tiny.options(run))
    assert contents(run / "model") == again
    assert (run / "scores" / "ranks.json").read_text() == edited
    assert states(run)["scores/ranks.json"] == "edited by hand"


def test_a_compress_that_overwrites_keeps_the_edit_too(tiny: Tiny, finished: Finished):
    run = finished("svd")
    edited = edit(run, lower)
    done("compress", *tiny.options(run, "svd"), "--overwrite")
    assert (stored(run)[NAME]["format"], stored(run)[NAME]["rank"]) == ("pair", 5)
    assert (run / "scores" / "ranks.json").read_text() == edited


def test_an_edit_between_score_and_factorize_needs_no_overwrite(tiny: Tiny, tmp_path: Path):
    run = tmp_path / "run"
    done("calibrate", *tiny.options(run, "svd"))
    done("score", run)
    edit(run, lower)
    done("factorize", run)
    assert stored(run)[NAME]["rank"] == 5
    done("compress", *tiny.options(run, "svd"))
    assert stored(run)[NAME]["rank"] == 5


def test_the_report_says_what_an_edit_reaches(finished: Finished):
    run = finished("svd")
    edit(run, lambda matrices: [entry.update(format="dense", rank=None) for entry in matrices.values()])
    said = done("factorize", run, "--overwrite", "--json").json
    assert said["reached_ratio"] == 0
    assert said["stored_elements"] == said["claimed_elements"]


@pytest.mark.parametrize("ratio", [0.3, 0.5])
def test_new_ranks_move_an_edit_aside(finished: Finished, ratio: float):
    run = finished("auto")
    original = (run / "scores" / "ranks.json").read_text()
    edited = edit(run, lower)
    done("score", run, "--ratio", ratio, "--overwrite")
    assert (run / "scores" / "ranks.json.bak").read_text() == edited
    assert ((run / "scores" / "ranks.json").read_text() == original) == (ratio == 0.3)


def test_another_recipe_moves_an_edit_aside(tiny: Tiny, finished: Finished):
    run = finished("auto")
    edited = edit(run, lower)
    done("compress", *tiny.options(run), "--ratio", 0.5, "--overwrite")
    assert (run / "scores" / "ranks.json.bak").read_text() == edited


def test_ranks_that_nobody_edited_leave_no_copy(tiny: Tiny, finished: Finished):
    run = finished("auto")
    (run / "scores" / "ranks.json.bak").write_text("precious")
    done("compress", *tiny.options(run), "--ratio", 0.5, "--overwrite")
    assert (run / "scores" / "ranks.json.bak").read_text() == "precious"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.pop(NAME), f"it lacks {NAME}"),
        (lambda m: m.update(other=m[NAME]), "it names other, which the model does not have"),
        (lambda m: m[NAME].update(rank=0), "expected a rank from 1 to 15 (more stores no less than dense)"),
        (lambda m: m[NAME].update(rank=16), "expected a rank from 1 to 15"),
        (lambda m: m[NAME].update(format="pivot", rank=32), "expected a rank from 1 to 26"),
        (lambda m: m[NAME].update(rank=True), "rank True"),
        (lambda m: m[NAME].update(rank=2.5), "rank 2.5"),
        (lambda m: m[NAME].update(format="pear"), "format 'pear'"),
        (lambda m: m[NAME].update(format="dense"), "with rank null"),
        (lambda m: m.update({NAME: 5}), "does not have the form"),
        (lambda m: m[NAME].update(shape=[16, 32]), "has shape [16, 32]; it is [32, 32] in the model"),
        (lambda m: m[NAME].update(rnak=3), "does not have the form"),
        (lambda m: m[NAME].update(format="width", rank=3), "expected one of pair, pivot, svd-core, auto with a rank"),
        (
            lambda m: m[NAME].update(format="pair", rank=14),
            f"{NAME} asks for rank 14 (pair), but its basis was kept up",
        ),
        (lambda m: m[NAME].update(format="pivot", rank=20), "asks for rank 20 (pivot), but its basis was kept up to"),
    ],
)
def test_ranks_that_do_not_fit_are_refused_and_damage(finished: Finished, change: Callable[[dict], None], message: str):
    run = finished("svd")
    before = contents(run / "model")
    edit(run, change)
    assert message in refused("factorize", run, "--overwrite")
    assert contents(run / "model") == before
    said = lrc("verify", run)
    assert said.code == 2
    assert "scores/ranks.json (missing or altered)" in said.text


def test_a_rank_above_the_kept_basis_is_refused_with_a_way_out(tiny: Tiny, finished: Finished):
    run = finished("svd")
    edited = edit(run, lambda matrices: matrices[NAME].update(rank=14))
    message = refused("factorize", run, "--overwrite")
    assert f"{NAME} asks for rank 14 (pair), but its basis was kept up to rank 11" in message
    assert not (run / "work").exists()
    assert "--allocate loss and --overwrite" in message
    done("compress", *tiny.options(run, "svd"), "--allocate", "loss", "--overwrite")
    assert (run / "scores" / "ranks.json.bak").read_text() == edited
    edit(run, lambda matrices: matrices[NAME].update(format="pair", rank=14))
    done("factorize", run, "--overwrite")
    assert (stored(run)[NAME]["format"], stored(run)[NAME]["rank"]) == ("pair", 14)


@pytest.mark.parametrize(
    ("form", "rank"), [("pair", 7), ("pivot", 7), ("pivot", 15), ("dense", None)], ids=lambda value: str(value)
)
@pytest.mark.parametrize("storage", ["pair", "pivot", "auto"])
def test_an_edited_format_is_followed_whatever_the_storage(
    tiny: Tiny, tmp_path: Path, storage: str, form: str, rank: int | None
):
    run = tmp_path / "run"
    done("compress", *tiny.options(run, "svd"), "--allocate", "loss", "--storage", storage)
    others = {name: matrix for name, matrix in stored(run).items() if name != NAME}
    edit(run, lambda matrices: matrices[NAME].update(format=form, rank=rank))
    assert states(run)["scores/ranks.json"] == "edited by hand"
    done("compress", *tiny.options(run, "svd"), "--allocate", "loss", "--storage", storage, "--overwrite")
    assert (stored(run)[NAME]["format"], stored(run)[NAME]["rank"]) == (form, rank)
    assert {name: matrix for name, matrix in stored(run).items() if name != NAME} == others
    layers = json.loads((run / "model" / "config.json").read_text())["quantization_config"]["modules"]
    assert [(part["format"], part["rank"]) for part in layers.get(NAME, {"parts": []})["parts"]] == (
        [(form, rank)] if rank else []
    )


def test_a_dense_matrix_becomes_a_pair(tiny: Tiny, tmp_path: Path):
    run = tmp_path / "run"
    done("compress", *tiny.options(run, "svd"), "--allocate", "welore", "--ratio", 0.05)
    ranks = json.loads((run / "scores" / "ranks.json").read_text())["matrices"]
    name = next(name for name, entry in ranks.items() if entry["format"] == "dense")
    edit(run, lambda matrices: matrices[name].update(format="pair", rank=3))
    done("factorize", run, "--overwrite")
    assert (stored(run)[name]["format"], stored(run)[name]["rank"]) == ("pair", 3)


def test_a_width_is_followed_and_no_other_format_taken_for_it(tiny: Tiny, tmp_path: Path):
    run, name = tmp_path / "run", "model.layers.0:mlp"
    done("compress", *tiny.options(run, "nystrom"))
    edit(run, lambda matrices: matrices[name].update(rank=29))
    done("factorize", run, "--overwrite")
    assert (stored(run)[name]["format"], stored(run)[name]["rank"]) == ("width", 29)
    before = contents(run / "model")
    edit(run, lambda matrices: matrices[name].update(format="pair"))
    assert "expected one of width with a rank" in refused("factorize", run, "--overwrite")
    assert contents(run / "model") == before


def test_an_alternative_that_was_not_decomposed_is_refused(tiny: Tiny, tmp_path: Path):
    run = tmp_path / "run"
    done("compress", *tiny.options(run), "--allocate", "uniform")

    def to_width(matrices: dict) -> None:
        for name in [name for name in matrices if name.startswith("model.layers.0.mlp.")]:
            del matrices[name]
        matrices["model.layers.0:mlp"] = {"format": "width", "rank": 20}

    edit(run, to_width)
    message = refused("factorize", run, "--overwrite")
    assert "model.layers.0:mlp was not decomposed, because another way to store that part was taken" in message


def test_another_storage_is_for_all_that_can_have_it(tiny: Tiny, tmp_path: Path):
    run = tmp_path / "run"
    done("compress", *tiny.options(run, "svd"), "--allocate", "loss", "--storage", "pair")
    before = stored(run)
    edit(run, lambda matrices: matrices[NAME].update(format="pair", rank=7))
    done("factorize", run, "--overwrite", "--storage", "pivot")
    after = stored(run)
    assert {matrix["format"] for matrix in after.values()} <= {"pivot", "dense"}
    assert (after[NAME]["format"], after[NAME]["stored"] <= 7 * 64 < 8 * (64 - 8) + 8) == ("pivot", True)
    assert all(after[name]["stored"] <= before[name]["stored"] for name in after if name != NAME)


def test_unreadable_ranks_are_an_error(finished: Finished):
    run = finished("svd")
    (run / "scores" / "ranks.json").write_text("{")
    assert "ranks.json cannot be read as JSON" in refused("factorize", run, "--overwrite")
    (run / "scores" / "ranks.json").unlink()
    assert "holds no finished scores" in refused("factorize", run, "--overwrite")


def test_the_report_follows_the_scores_even_where_the_ranks_do_not_change(finished: Finished):
    """The asked ratio is written into lowrank.json: a checkpoint of other scores is another result."""
    run = finished("svd")
    ranks = (run / "scores" / "ranks.json").read_text()
    done("score", run, "--ratio", 0.3001, "--overwrite")
    assert (run / "scores" / "ranks.json").read_text() == ranks
    assert "--overwrite" in refused("factorize", run)
    done("factorize", run, "--overwrite")
    assert json.loads((run / "model" / "lowrank.json").read_text())["asked_ratio"] == 0.3001
