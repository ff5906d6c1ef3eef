"""What README and the pages of docs/ say can be done: commands parse, paths and targets exist, Python works."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

from lowrank_compress.allocation.table import ALLOCATORS, Allocator
from lowrank_compress.arch.spec import Architecture
from lowrank_compress.cli.main import app
from lowrank_compress.formats.table import FORMATS
from lowrank_compress.methods.linear import LinearMethod
from lowrank_compress.methods.table import METHODS
from tests.plugins import installed
from tests.runs import Tiny

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXT = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
INLINE = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", TEXT, flags=re.DOTALL | re.MULTILINE))
SHELL = [line for kind, block in BLOCKS if kind == "bash" for line in block.splitlines()]
COMMANDS = sorted({line.strip() for line in [*SHELL, *INLINE] if line.strip().startswith("lrc ")})
PATH = re.compile(
    r"^(\.\w+/)?(configs|scripts|tests|lowrank_compress|\.ci|\.githooks|[\w-]+\.(yaml|txt|md|toml))(/[\w./-]+)?$"
)
# Names in examples that stand for the reader's own files, and files of a run.
EXAMPLES = {"my-text.txt", "other-text.txt", "recipe.yaml", "lowrank_compress"}


def parse(words: list[str]) -> Any:
    """Parse a command line as the program does, and run nothing."""
    group: Any = typer.main.get_command(app)
    name, *rest = words
    assert name in group.commands, f"lrc has no command {name!r}"
    return group.commands[name].make_context(name, rest)


@pytest.mark.parametrize("command", COMMANDS)
def test_command_parses(command: str) -> None:
    words = [word for word in shlex.split(command, comments=True)[1:] if word != "…"]
    if len(words) == 1:  # spoken of, not given
        group: Any = typer.main.get_command(app)
        assert words[0] in group.commands or words[0] in {opt for each in group.params for opt in each.opts}
        return
    context = parse(words)
    given = context.params
    assert given.get("method") in {None, "dense", *METHODS}
    assert given.get("allocate") in {None, *ALLOCATORS}
    assert given.get("storage") in {None, *FORMATS}
    if given.get("config") is not None:
        assert (ROOT / given["config"]).is_file()


def test_there_are_commands() -> None:
    assert {command.split()[1] for command in COMMANDS} >= {
        "compress",
        "calibrate",
        "score",
        "factorize",
        "eval",
        "show",
    }


@pytest.mark.parametrize("word", sorted({word for word in INLINE if re.match(r"--[a-z-]+", word)}))
def test_option_exists(word: str) -> None:
    group: Any = typer.main.get_command(app)
    known = {
        o
        for command in group.commands.values()
        for parameter in command.params
        for o in (*parameter.opts, *parameter.secondary_opts)
    }
    assert word.split()[0] in known


@pytest.mark.parametrize("path", sorted({word for word in INLINE if PATH.match(word)} - EXAMPLES))
def test_path_exists(path: str) -> None:
    assert (ROOT / path).exists() or (ROOT / "configs" / path).exists()


@pytest.mark.parametrize("script", sorted(set(re.findall(r"python (scripts/\w+\.py)", TEXT))))
def test_script_exists(script: str) -> None:
    assert (ROOT / script).is_file()


@pytest.mark.parametrize("target", sorted(set(re.findall(r"(?:^|`)make (\w+)", TEXT, re.MULTILINE))))
def test_make_target_exists(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)


def test_every_recipe_is_named() -> None:
    assert {path.name for path in (ROOT / "configs").glob("*.yaml")} <= set(INLINE)


def test_every_method_and_allocator_is_explained() -> None:
    own = {name for table in (METHODS, ALLOCATORS) for name in table.own} | set(FORMATS)
    assert own <= set(INLINE)


@pytest.mark.parametrize(
    "code", [block for kind, block in BLOCKS if kind == "python"], ids=lambda code: code.split()[1]
)
def test_python_compiles(code: str) -> None:
    compile(code, "README.md", "exec")


def test_python_of_the_first_minutes_runs(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run is made first from Python, then loaded in each of the ways that are shown."""
    shutil.copytree(tiny.model, tmp_path / "my-model")
    shutil.copy(tiny.text, tmp_path / "my-text.txt")
    shutil.copy(tiny.heldout, tmp_path / "other-text.txt")
    monkeypatch.chdir(tmp_path)
    first = (ROOT / "README.md").read_text(encoding="utf-8")
    codes = [block for kind, block in BLOCKS if kind == "python" and block in first]
    codes.sort(key=lambda code: "import compress" not in code)
    made: list[dict[str, Any]] = []
    for code in codes:
        names: dict[str, Any] = {}
        exec(code, names)
        made.append(names)
    assert "compress" in made[0]
    assert len(made) == 3
    kept = [found["model"].state_dict() for found in made]
    assert all(torch.equal(kept[0][name], each[name]) for each in kept for name in kept[0])


def test_plug_ins_are_what_the_tables_take() -> None:
    (code,) = (block for kind, block in BLOCKS if kind == "python" and "METHOD" in block)
    made: dict[str, Any] = {}
    exec(code, made)
    assert isinstance(made["METHOD"], LinearMethod)
    assert isinstance(made["ALLOCATOR"], Allocator)
    assert isinstance(made["ARCHITECTURE"], Architecture)
    (toml,) = (block for kind, block in BLOCKS if kind == "toml")
    for group, name in re.findall(r'\[project\.entry-points\."([\w.]+)"\]\n[\w-]+ = "my_package:(\w+)"', toml):
        assert group in {"lowrank_compress.methods", "lowrank_compress.allocators", "lowrank_compress.architectures"}
        assert name in made


@pytest.mark.slow
def test_the_tests_of_the_tables_take_plug_ins_up_and_they_pass(tmp_path: Path) -> None:
    (code,) = (block for kind, block in BLOCKS if kind == "python" and "METHOD" in block)
    (toml,) = (block for kind, block in BLOCKS if kind == "toml")
    found = re.findall(r'\[project\.entry-points\."([\w.]+)"\]\n([\w-]+) = "([\w:]+)"', toml)
    plugged = installed(tmp_path / "site", code, {group: {name: value} for group, name, value in found})
    tables = [str(ROOT / "tests" / path) for path in ("allocation/test_table.py", "methods/test_linear.py")]
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-k", "first-come or fisher-only or names", *tables]
    said = subprocess.run(command, env=plugged, cwd=tmp_path, text=True, capture_output=True, check=False)
    assert said.returncode == 0, said.stdout
    assert int(re.findall(r"(\d+) passed", said.stdout)[0]) > 50


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def test_a_newcomer_reads_five_minutes() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 200
