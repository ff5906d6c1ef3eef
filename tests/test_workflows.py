"""The workflows: their YAML is what GitHub takes, and their commands do what they say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def read(name: str) -> dict[Any, Any]:
    return yaml.safe_load((ROOT / ".github" / "workflows" / f"{name}.yml").read_text(encoding="utf-8"))


def steps(name: str) -> list[dict[str, Any]]:
    return [step for job in read(name)["jobs"].values() for step in job["steps"]]


def commands(name: str) -> list[str]:
    """The lines of all `run:` steps."""
    return [line for step in steps(name) for line in step.get("run", "").splitlines()]


def start(command: str, stamp: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a step as GitHub does, with the interpreter of this test for the one that make would install."""
    stamp.touch()
    flags = f" -- STAMP={stamp} BIN={Path(sys.executable).parent}"
    return subprocess.run(
        ["bash", "-e", "-c", command],
        cwd=ROOT,
        env=os.environ | {"MAKEFLAGS": flags, "PYTHONPATH": str(ROOT)} | environment,
        text=True,
        capture_output=True,
    )


def test_there_are_two():
    assert [path.stem for path in WORKFLOWS] == ["regenerate", "test"]


def test_yaml_is_a_workflow():
    check = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows", *WORKFLOWS]
    done = subprocess.run(list(map(str, check)), text=True, capture_output=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_actions_have_a_major_version(path: Path):
    used = [step["uses"] for step in steps(path.stem) if "uses" in step]
    assert used
    assert all(re.fullmatch(r"actions/[a-z-]+@v\d+", action) for action in used)


def test_tests_run_what_ci_runs():
    assert commands("test") == [".ci/run"]
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_every_make_target_exists():
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    targets = [line.split()[1] for line in [*commands("regenerate"), *script] if line.startswith("make ")]
    assert {"setup", "regenerate", "check", "test"} <= set(targets)
    assert all(re.search(rf"^{target}:", MAKEFILE, re.MULTILINE) for target in targets)


def test_regenerate_is_on_a_schedule_and_on_pull_requests():
    triggers = read("regenerate")[True]  # YAML 1.1 reads `on` as a truth value
    assert {"schedule", "pull_request"} <= set(triggers)


@pytest.mark.slow
def test_regenerate_keeps_report_and_checkpoints(tmp_path: Path):
    """The steps run, for one recipe, and leave what the upload steps name."""
    out = tmp_path / "runs" / "regenerate"
    options = f"--recipes welore --samples 2 --write --expected {tmp_path / 'expected'} --out {out}"
    for command in commands("regenerate"):
        done = start(command, tmp_path / "stamp", ARGS=options, GITHUB_STEP_SUMMARY=str(tmp_path / "summary.md"))
        assert done.returncode == 0, done.stdout + done.stderr
    assert "| welore | good | the same bytes |" in (tmp_path / "summary.md").read_text()
    uploads = [step for step in steps("regenerate") if "upload-artifact" in step.get("uses", "")]
    assert all(step["if"] == "always()" for step in uploads)
    kept = {
        step["with"]["name"]: [path for line in step["with"]["path"].split() for path in tmp_path.glob(line)]
        for step in uploads
    }
    assert {path.name for path in kept["report"]} == {"report.md", "repeated.md"}
    (model,) = kept["checkpoints"]
    assert (model / "model.safetensors").is_file()
    assert (tmp_path / "expected" / "welore.json").is_file()
