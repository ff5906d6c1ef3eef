"""`lrc verify --write`, `lrc compress --check`: a run made again has the same bytes, or it is said what has not."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowrank_compress.artifacts.documents import canonical_hash
from tests.runs import Tiny, contents, done, lrc, refused, times

Finished = Callable[[str], Path]


@pytest.fixture(scope="module", params=["auto", "modegpt"])
def method(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def expected(method: str, pristine: Finished, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An expectation that names no run to compare elements with."""
    path = tmp_path_factory.mktemp("expected") / "expected.json"
    done("verify", pristine(method), "--write", path)
    return path


def again(tiny: Tiny, method: str, *options: object) -> list[object]:
    """Arguments that make a run again, in a directory that is not named."""
    return [*tiny.options(Path("unused"), method)[:-2], *options]


def with_one_ulp(tiny: Tiny, tensor: str, place: Path) -> Tiny:
    """Copy the model, with one element of one weight the next number."""
    model = place / tiny.model.name
    shutil.copytree(tiny.model, model)
    tensors = load_file(model / "model.safetensors")
    flat = tensors[tensor].flatten()
    flat[7] = torch.nextafter(flat[7], torch.tensor(torch.inf))
    tensors[tensor] = flat.view(tensors[tensor].shape)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    return Tiny(model, tiny.text, tiny.heldout)


def edited(path: Path, change: Callable[[dict], None], to: Path) -> Path:
    """Write an expectation of which something is another, under a right hash."""
    found = json.loads(path.read_text())
    del found["digest"]
    change(found)
    to.write_text(json.dumps(found | {"digest": canonical_hash(found)}))
    return to


def test_the_same_bytes(tiny: Tiny, method: str, expected: Path, tmp_path: Path):
    report = tmp_path / "report.md"
    said = lrc("compress", *again(tiny, method, "--check", expected, "--report", report, "--out", tmp_path / "run"))
    assert (said.code, said.out.split(":")[0]) == (0, "The same bytes")
    assert "the same bytes" in report.read_text()
    done("verify", tmp_path / "run")


def test_one_ulp_of_the_base_is_found_and_named(tiny: Tiny, method: str, expected: Path, tmp_path: Path):
    weight = "model.layers.1.self_attn.v_proj.weight"
    changed = with_one_ulp(tiny, weight, tmp_path)
    said = lrc("compress", *again(changed, method, "--check", expected, "--json"))
    assert said.code == 2
    assert "base file model.safetensors" in said.text
    assert weight in said.text
    found = said.json
    assert (found["verdict"], found["exit_code"], found["environment"]) == ("different", 2, [])
    assert [each["what"] for each in found["inputs"]] == ["base file model.safetensors", f"base tensor {weight}"]
    # What follows from it in the checkpoint, by name: block 1, and of block 0 what its curvature moves.
    named = {each["tensor"] for each in found["tensors"] if each["stage"] == "model"}
    assert any(name.startswith("model.layers.1.") for name in named)
    assert not any(".layers." not in name for name in named)
    moved = {each["weight"]: each["distance"] for each in found["weights"] if each["distance"]}
    assert 0 < max(moved.values()) < 1e-5
    assert all(each["estimated"] for each in found["weights"])


def test_a_changed_base_is_not_within_any_tolerance(tiny: Tiny, method: str, expected: Path, tmp_path: Path):
    changed = with_one_ulp(tiny, "model.layers.1.self_attn.v_proj.weight", tmp_path)
    assert lrc("compress", *again(changed, method, "--check", expected, "--tolerance", "0.1")).code == 2


def nudge(found: dict) -> None:
    """Let the expected checkpoint and its environment be those of a machine with other last bits."""
    found["model"]["environment"]["torch"] = found["scores"]["environment"]["torch"] = "1.0"
    for stage in ("scores", "model"):
        for name, entry in found[stage]["files"].items():
            if name.endswith(".safetensors"):
                entry["sha256"] = "0" * 64
        for entry in found[stage]["tensors"].values():
            entry["sha256"] = "0" * 64
    for entry in found["weights"].values():
        entry["norm"] *= 1 + 1e-9


@pytest.mark.slow
def test_last_bits_of_another_environment_are_told_and_tolerated(
    tiny: Tiny, method: str, expected: Path, tmp_path: Path
):
    elsewhere = edited(expected, nudge, tmp_path / "elsewhere.json")
    strict = lrc("compress", *again(tiny, method, "--check", elsewhere))
    assert strict.code == 2
    assert "--tolerance" in strict.text
    report = tmp_path / "report.json"
    options = ("--tolerance", "1e-4", "--report", report)
    said = lrc("compress", *again(tiny, method, "--check", elsewhere, *options))
    assert said.code == 3
    assert f"torch 1.0 → {torch.__version__}" in said.text  # before the work
    assert said.out.index("torch: 1.0") < said.out.index("model.safetensors: judged by weights")
    assert "The same within the tolerance" in said.out
    assert json.loads(report.read_text())["verdict"] == "within tolerance"


def test_a_weight_beyond_the_tolerance_is_different(tiny: Tiny, method: str, expected: Path, tmp_path: Path):
    def far(found: dict) -> None:
        nudge(found)
        found["weights"]["model.layers.0.self_attn.q_proj"]["norm"] /= 100
        first = found["weights"]["model.layers.0.self_attn.q_proj"]
        first["sketch"] = found["weights"]["model.layers.1.self_attn.q_proj"]["sketch"]

    said = lrc(
        "compress", *again(tiny, method, "--tolerance", "1e-4", "--check", edited(expected, far, tmp_path / "e"))
    )
    assert said.code == 2
    assert "model.layers.0.self_attn.q_proj: about" in said.out


def test_elements_are_compared_with_the_run_that_the_expectation_names(tiny: Tiny, finished: Finished, tmp_path: Path):
    run = finished("svd")
    expected = tmp_path / "expected.json"
    done("verify", run, "--write", expected)
    assert json.loads(expected.read_text())["checkpoint"] == run.name
    weight = "model.layers.0.mlp.up_proj.weight"
    changed = with_one_ulp(tiny, weight, tmp_path)
    for options in ((), ("--against", run / "model")):
        found = lrc("compress", *again(changed, "svd", "--check", expected, "--json", *options)).json
        (first, *_) = [each for each in found["tensors"] if each["stage"] == "model"]
        assert first["tensor"].startswith("model.layers.0.mlp.up_proj.")
        reference = load_file(run / "model" / "model.safetensors")[first["tensor"]]
        place = tuple(first["elements"]["index"])
        assert first["elements"]["expected"] == reference[place].item()
        assert first["elements"]["found"] != reference[place].item()
        assert 0 < first["elements"]["norm"] <= 1e-4
        assert not any(each["estimated"] for each in found["weights"])
        # Plain SVD: nothing but this matrix moves.
        assert {each["weight"] for each in found["weights"] if each["distance"]} == {"model.layers.0.mlp.up_proj"}


def test_a_runs_own_recipe_is_enough(finished: Finished, tmp_path: Path):
    run = finished("svd")
    done("verify", run, "--write", tmp_path / "e.json")
    assert lrc("compress", "--config", run / "recipe.yaml", "--check", tmp_path / "e.json").code == 0


def test_a_run_that_is_there_counts_for_nothing(tiny: Tiny, finished: Finished, tmp_path: Path):
    run = finished("svd")
    done("verify", run, "--write", tmp_path / "e.json")
    (run / "notes.txt").write_text("mine")
    with open(run / "model" / "model.safetensors", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    before = contents(run), times(run)
    said = lrc("compress", *again(tiny, "svd", "--check", tmp_path / "e.json", "--out", run))
    assert said.code == 0
    assert "holds a run already" in said.text
    assert (contents(run), times(run)) == before


def test_another_recipe_is_refused_before_any_work(tiny: Tiny, method: str, expected: Path, tmp_path: Path):
    options = again(tiny, method, "--ratio", "0.4", "--check", expected, "--out", tmp_path / "run")
    assert "ratio is 0.3 there and 0.4 here" in refused("compress", *options)
    assert not (tmp_path / "run").exists()


def test_another_text_is_named(tiny: Tiny, method: str, expected: Path):
    other = Tiny(tiny.model, tiny.heldout, tiny.text)
    said = lrc("compress", *again(other, method, "--check", expected))
    assert said.code == 2
    assert "calibration text: calibration.txt" in said.out


@pytest.mark.parametrize(
    ("spoil", "what"),
    [
        (lambda path: path.unlink(), "does not exist"),
        (lambda path: path.write_text("{}"), "no expectation"),
        (lambda path: path.write_text(path.read_text().replace('"ratio": 0.3', '"ratio": 0.2')), "was changed"),
        (lambda path: edited(path, lambda found: found.update(schema=99), path), "schema 99"),
        (lambda path: edited(path, lambda found: found["base"].pop("id"), path), "damaged"),
        (
            lambda path: edited(path, lambda found: found["weights"].update(a={"norm": 1, "sketch": "?"}), path),
            "damaged",
        ),
        (lambda path: edited(path, lambda found: found["base"].update(name="\ud800"), path), "damaged"),
        (lambda path: edited(path, lambda found: found["scores"].update(environment=[]), path), "damaged"),
        (lambda path: (path.unlink(), os.mkfifo(path)), "no expectation"),
        (lambda path: path.write_text("[" * 100_000), "no expectation"),
    ],
    ids=["missing", "foreign", "edited", "schema", "incomplete", "sketch", "surrogate", "list", "pipe", "deep"],
)
def test_what_is_no_expectation_is_refused(
    tiny: Tiny, expected: Path, tmp_path: Path, spoil: Callable[[Path], object], what: str
):
    path = tmp_path / "expected.json"
    shutil.copy(expected, path)
    spoil(path)
    said = refused("compress", *again(tiny, "auto", "--check", path))
    assert what in said
    assert "--write" in said


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (("--tolerance", "1e-4"), "--check"),
        (("--report", "x.md"), "--check"),
        (("--check", "E", "--dry-run"), "--dry-run"),
        (("--check", "E", "--overwrite"), "--overwrite"),
        (("--check", "E", "--tolerance", "0"), "--tolerance"),
        (("--check", "E", "--tolerance", "nan"), "--tolerance"),
        (("--check", "E", "--against", "/nowhere"), "--against"),
    ],
)
def test_options_without_meaning_are_refused(tiny: Tiny, expected: Path, options: tuple[str, ...], what: str):
    words = [str(expected) if word == "E" else word for word in options]
    assert what in refused("compress", *again(tiny, "auto", *words))


@pytest.mark.slow
def test_a_report_replaces_a_report_and_nothing_else(tiny: Tiny, method: str, expected: Path, tmp_path: Path):
    mine, report = tmp_path / "thesis.md", tmp_path / "report.md"
    mine.write_text("# Mine\n")
    assert "thesis.md" in refused("compress", *again(tiny, method, "--check", expected, "--report", mine))
    assert mine.read_text() == "# Mine\n"
    for _ in range(2):
        assert lrc("compress", *again(tiny, method, "--check", expected, "--report", report)).code == 0


@pytest.mark.parametrize(
    "spoiled", ["model/model.safetensors", "scores/ranks.json", "recipe.yaml", "model/manifest.json"]
)
def test_no_expectation_of_a_run_that_was_changed(finished: Finished, tmp_path: Path, spoiled: str):
    run = finished("svd")
    path = run / spoiled
    if path.suffix == ".safetensors":
        path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    else:
        path.write_text(path.read_text().replace("0.3", "0.2").replace('"schema": 1', '"schema":  1'))
    assert spoiled.rpartition("/")[2] in refused_any("verify", run, "--write", tmp_path / "e.json")
    assert not (tmp_path / "e.json").exists()


def refused_any(*arguments: object) -> str:
    """Run a command that must fail with exit code 2, whatever it prints before."""
    said = lrc(*arguments)
    assert said.code == 2
    return said.err


def test_no_expectation_of_a_base_that_has_changed(tiny: Tiny, tmp_path: Path):
    changed = with_one_ulp(tiny, "lm_head.weight", tmp_path)
    done("compress", *changed.options(tmp_path / "run", "svd"))
    shutil.copy(tiny.model / "model.safetensors", changed.model / "model.safetensors")
    assert "changed since" in refused_any("verify", tmp_path / "run", "--write", tmp_path / "e.json")


def test_an_expectation_is_not_put_among_the_files_of_the_run(finished: Finished):
    run = finished("svd")
    before = contents(run)
    for place in ("model/config.json", "scores/expected.json", "recipe.yaml", "run.json"):
        assert "of the run itself" in refused_any("verify", run, "--write", run / place, "--overwrite")
    assert contents(run) == before
    done("verify", run, "--write", run / "expected.json")
    assert json.loads((run / "expected.json").read_text())["checkpoint"] == "."


def test_stdout_is_one_object(pristine: Finished, tmp_path: Path):
    assert done("verify", pristine("svd"), "--write", tmp_path / "e.json", "--json").json["ok"]


def test_a_foreign_directory_is_refused(tiny: Tiny, method: str, expected: Path, tmp_path: Path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("mine")
    refused("compress", *again(tiny, method, "--check", expected, "--out", tmp_path / "mine"))
    assert contents(tmp_path / "mine").keys() == {"thesis.tex"}


def test_only_an_expectation_is_replaced(pristine: Finished, tmp_path: Path):
    path = tmp_path / "e.json"
    path.write_text('{"mine": 1}')
    assert "no expectation" in refused_any("verify", pristine("svd"), "--write", path)
    assert path.read_text() == '{"mine": 1}'
    done("verify", pristine("svd"), "--write", path, "--overwrite")
    assert (tmp_path / "e.json.bak").read_text() == '{"mine": 1}'
    written = path.read_bytes()
    done("verify", pristine("svd"), "--write", path)
    assert path.read_bytes() == written


def test_an_expectation_is_the_same_on_every_machine(pristine: Finished, tiny: Tiny, tmp_path: Path):
    done("verify", pristine("auto"), "--write", tmp_path / "e.json")
    text = (tmp_path / "e.json").read_text()
    assert str(tiny.model.parent) not in text
    assert str(tmp_path) not in text
    assert str(pristine("auto")) not in text
