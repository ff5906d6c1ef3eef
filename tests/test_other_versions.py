"""`scripts/other_versions.py`: what it tests on, what it says, and when it fails."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.version import Version
from typer.testing import CliRunner, Result

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import other_versions

    return other_versions


@pytest.fixture
def ran(script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., tuple[Result, list[str]]]:
    """Run it with an index and tests that answer as told."""
    import typer

    def run(
        *options: str, here: str = "5.24.0", newest: str | None = "5.30.1", problem: str = "", code: int = 0
    ) -> tuple[Result, list[str]]:
        tested: list[str] = []

        def tests(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
            tested.append(" ".join(command))
            return subprocess.CompletedProcess(command, code)

        monkeypatch.setattr(script, "ROOT", tmp_path)
        monkeypatch.setattr(script, "requirement", lambda: Requirement("transformers>=5.21,<6"))
        monkeypatch.setattr(script, "installed_version", lambda _: here)
        monkeypatch.setattr(script, "newest", lambda _: newest and Version(newest))
        monkeypatch.setattr(script, "make", lambda *_: problem)
        monkeypatch.setattr(script.subprocess, "run", tests)
        app = typer.Typer()
        app.command()(script.main)
        return CliRunner().invoke(app, list(options)), tested

    return run


def test_the_bounds_are_those_of_pyproject(script: ModuleType) -> None:
    asked = script.requirement()
    (line,) = re.findall(r'"transformers>=([\d.]+),<6"', (ROOT / "pyproject.toml").read_text())
    assert script.oldest(asked) == Version(line)
    pinned = re.findall(r"^transformers==(.*)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert asked.specifier.contains(pinned[0])


def test_both_are_tested_and_pytest_gets_its_options(ran: Any) -> None:
    result, tested = ran("--", "-n", "2")
    assert result.exit_code == 0
    assert [re.findall(r"\.venv-\w+", command)[0] for command in tested] == [".venv-oldest", ".venv-newest"]
    assert all(command.endswith("-m pytest -m versions -q -p no:cacheprovider -n 2") for command in tested)
    assert "The oldest transformers<6,>=5.21 is 5.21:" in result.output
    assert "The newest transformers<6,>=5.21 is 5.30.1:" in result.output


def test_what_is_installed_is_not_tested_again(ran: Any) -> None:
    result, tested = ran(newest="5.24.0")
    assert len(tested) == 1
    assert "The newest transformers<6,>=5.21 is 5.24.0, on which all tests run: nothing to do." in result.output
    result, tested = ran(here="5.21.0", newest="5.24.0")
    assert "oldest transformers<6,>=5.21 is 5.21, on which all tests run" in result.output
    assert ".venv-newest" in tested[0]


def test_a_failure_of_a_test_is_one_of_the_script(ran: Any) -> None:
    assert ran(code=1)[0].exit_code == 1


@pytest.mark.parametrize(("options", "code"), [((), 0), (("--required",), 1)])
def test_without_an_index(ran: Any, options: tuple[str, ...], code: int) -> None:
    result, tested = ran(*options, newest=None)
    assert result.exit_code == code
    assert "cannot be asked for the newest transformers<6,>=5.21: not tested beyond 5.24.0" in result.output
    assert len(tested) == 1
    result, tested = ran(*options, problem="ERROR: no index")
    assert result.exit_code == code
    assert result.output.count("cannot be installed (ERROR: no index): not tested.") == 2
    assert not tested


def test_an_index_that_cannot_be_reached_is_no_error(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    assert script.newest(script.requirement()) is None


def test_make_test_runs_it_and_make_clean_removes_its_environments() -> None:
    text = (ROOT / "Makefile").read_text()
    recipe = text[text.index("\ntest:") :].split("\n\n")[0]
    assert "scripts/other_versions.py $(VERSIONS) -- -n $(TEST_WORKERS)" in recipe
    assert "$(VENV)-oldest $(VENV)-newest" in text
    assert "make test CASES=all VERSIONS=--required" in (ROOT / ".ci/run").read_text()
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    assert "/.venv-*/" in ignored
