"""What input can cause ends as one paragraph and exit code 2; what it cannot, as one line, exit code 1 and a file."""

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import typer

import lowrank_compress
from lowrank_compress.artifacts.hashes import cache_directory
from lowrank_compress.cli.main import app
from lowrank_compress.registry import unknown
from tests.runs import Tiny, done, lrc, refused

Finished = Callable[[str], Path]
ROOT = Path(lowrank_compress.__file__).parent


def raising(problem: BaseException) -> Callable[..., None]:
    def raises(*_: object, **__: object) -> None:
        raise problem

    return raises


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        (OSError(30, "Read-only file system", "/x/y"), "/x/y: Read-only file system. Check that the place is there"),
        (PermissionError(13, "Permission denied", "/x/y"), "/x/y: Permission denied"),
        (OSError(40, "Too many levels of symbolic links", "/x"), "/x: Too many levels"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "There is not enough memory"),
        (MemoryError(), "There is not enough memory"),
        (OSError(28, "No space left on device"), "The disk is full"),
        (OSError(5, "bad\nname\x1b[31m", "/x"), r"/x: bad name\x1b[31m."),
    ],
)
def test_what_the_system_says(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, problem: Exception, message: str
):
    monkeypatch.setattr("lowrank_compress.api.make_plan", raising(problem))
    assert message in refused("compress", *tiny.options(tmp_path / "run"))


def test_a_fault_of_ours_is_one_line_and_a_file(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lowrank_compress.api.make_plan", raising(ValueError("of\nours")))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    said = lrc("compress", *tiny.options(tmp_path / "run"))
    assert said.code == 1
    assert said.err.count("\n") == 1
    assert "ValueError: of ours. This is a fault of lrc; please report it with" in said.err
    (kept,) = tmp_path.glob("lrc-*.txt")
    assert kept.name in said.err
    assert "Traceback (most recent call last)" in kept.read_text()
    with pytest.raises(ValueError, match="of"):
        lrc("compress", *tiny.options(tmp_path / "run"), "--debug")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--clip", "inf"], "clip: Input should be a finite number"),
        (["--clip", "nan"], "clip: Input should be"),
        (["--alpha", "inf"], "alpha: Input should be a finite number"),
        (["--temperature", "-inf"], "temperature: Input should be"),
        (["--ratio", "inf"], "ratio: Input should be a finite number"),
        (["--seed", 2**64], "seed: Input should be less than"),
        (["--samples", 10**12], "samples: Input should be less than"),
        (["--samples", -1], "samples: Input should be greater than"),
        (["--seq-len", 10**12], "seq_len: Input should be less than"),
        (["--round-to", 0], "round_to: Input should be greater than"),
        (["--method", ""], "method is ''; expected printable text"),
        (["--method", "a\nb"], "expected printable text"),
        (["--calibration", "\udcff"], "expected printable text"),
        (["--device", "cuda:99"], "this torch sees no GPU"),
        (["--device", "toaster"], "Unknown device"),
        (["--memory-budget", "-1"], "is no size"),
        (["--memory-budget", "1e400"], "is no size"),
    ],
)
def test_values_out_of_range(tiny: Tiny, tmp_path: Path, arguments: list[object], message: str):
    assert message in refused("compress", *tiny.options(tmp_path / "run"), *arguments)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("option", "value"), [("--seed", 2**63), ("--seed", -1), ("--text-column", "\udcff")])
def test_values_of_an_evaluation_out_of_range(tiny: Tiny, option: str, value: object):
    refused("eval", tiny.model, "--perplexity", tiny.heldout, option, value)


@pytest.mark.parametrize("option", ["--out", "--config"])
def test_nothing_is_no_path(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str):
    monkeypatch.chdir(tmp_path)
    said = lrc("compress", tiny.model, "--method", "svd", option, "")
    assert said.code == 2
    assert "expected a path" in said.err
    assert list(tmp_path.iterdir()) == []


def test_places_that_cannot_be_made(tiny: Tiny, tmp_path: Path):
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for out in (tmp_path / "file" / "run", tmp_path / "loop", tmp_path / ("x" * 300), "/proc/run"):
        refused("compress", tiny.model, "--method", "svd", "--out", out)


def test_a_home_is_not_needed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", raising(KeyError("uid")))
    assert cache_directory() is None


def test_the_calibration_text_is_read_only_to_calibrate(tiny: Tiny, tmp_path: Path):
    text, run = tmp_path / "text.txt", tmp_path / "run"
    shutil.copy(tiny.text, text)
    done("calibrate", *tiny.options(run, "svd-llm", text=text))
    text.unlink()
    done("score", run)
    done("factorize", run)
    assert "does not exist" in refused("compress", *tiny.options(run, "svd-llm", text=text))


@pytest.mark.slow
def test_a_reader_that_has_seen_enough(tmp_path: Path):
    command = f"{sys.executable} -m lowrank_compress list methods --json | head -c 1"
    said = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False, cwd=ROOT.parent)
    assert said.stdout == "{"
    assert said.stderr == ""


def test_no_near_name_is_claimed_for_what_nobody_chose():
    assert "Did you mean" not in unknown("model type", "gemma", ["gemma2"], guess=False)
    assert "Did you mean 'svd'" in unknown("method", "svdd", ["svd", "kfac"])


def options() -> set[str]:
    """Every option of every command."""
    command = typer.main.get_command(app)
    return {
        name
        for each in command.commands.values()  # pyright: ignore[reportAttributeAccessIssue]
        for parameter in each.params
        for name in (*parameter.opts, *parameter.secondary_opts)
    }


def test_every_option_that_a_message_advises_exists():
    known = options()
    advised = {
        (path.name, name)
        for path in ROOT.rglob("*.py")
        if path.parent.name != "pages"  # whose style sheets have properties like these
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        for name in re.findall(r"(?<![\w-])--[a-z][a-z-]+(?<!-)", node.value)
    }
    # The last are lm-eval's, in the usage of the launcher, and vLLM's.
    others = {"--help", "--version", "--model", "--model-impl", "--tensor-parallel-size"}
    assert {(file, name) for file, name in advised if name not in known | others} == set()


def test_verify_advises_what_the_command_has(tiny: Tiny, finished: Finished):
    run = finished("svd")
    done("eval", run, "--perplexity", tiny.heldout)
    (metrics,) = run.glob("eval/*/metrics.json")
    metrics.write_text(metrics.read_text() + " ")
    said = lrc("verify", run)
    assert said.code == 2
    assert "Repeat `lrc eval` with the same options" in said.text
    done("eval", run, "--perplexity", tiny.heldout)
    assert done("verify", run, "--json").json["ok"]
    assert os.listdir(metrics.parent)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--out", "\udcff"], r"--out '\udcff' has characters that cannot be printed"),
        (["--out", "a\nb"], r"--out 'a\nb' has characters that cannot be printed"),
        (["--device", "cuda:99"], "The device cuda:99 was asked for"),
        (["--device", "cpu:-7"], "Unknown device 'cpu:-7'"),
        (["--storage", ""], "The command line: storage is ''"),
    ],
)
def test_options_of_compress(tiny: Tiny, tmp_path: Path, options: list[str], message: str):
    assert message in refused("compress", *tiny.options(tmp_path / "run", "svd"), *options)


def test_any_number_of_a_cpu_is_the_cpu(tiny: Tiny, tmp_path: Path):
    found = done("compress", *tiny.options(tmp_path / "run"), "--device", "cpu:7", "--dry-run", "--json").json
    assert found["recipe"]["device"] == "cpu"


def test_a_wrong_option_is_not_blamed_on_the_recipe_of_the_run(pristine: Finished, tmp_path: Path):
    for command, options in (("factorize", ["--dtype", "int8"]), ("score", ["--ratio", "nan"])):
        assert refused(command, pristine("svd"), *options).startswith("Error: The command line: ")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: x\nsamples: 0\n")
    assert "The recipe" in refused("compress", "--config", recipe, "--ratio", 2)


def test_a_name_in_a_table_commands_no_terminal(tmp_path: Path, pristine: Finished):
    for name in ("\x1b[31mred", "two\nlines", "\udcff"):
        shutil.copytree(pristine("svd"), tmp_path / name)
        assert repr(name)[1:-1] in done("verify", tmp_path / name).out.replace("\n", "")


@pytest.mark.parametrize(
    ("ratio", "message"), [("2", "is not between 0 and 1"), ("nan", "finite number"), ("0.99", "is out of reach")]
)
def test_the_demo_refuses_a_ratio_before_it_makes_texts(tmp_path: Path, ratio: str, message: str):
    assert message in refused("demo", "--ratio", ratio, "--out", tmp_path / "demo")
    assert not (tmp_path / "demo").exists()
