"""Imports go one way, nothing hides inside functions, and the command line starts without torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lowrank_compress
from lowrank_compress.shipped.join import joined

PACKAGE = "lowrank_compress"
ROOT = Path(lowrank_compress.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
ANYWHERE = {"errors", "registry", "options", "config", "strict", "texts", "recipe", "recipefile", "__init__"}
MATHEMATICS = {"methods", "formats", "calibration", "evaluation", "training", "allocation", "linalg"}
STAGES_USE = {*MATHEMATICS, "model", "shipped", "arch", "artifacts", "resources"}
# Who reads or writes files does so through artifacts, so that what may be opened, written and removed is one law.
BELOW: dict[str, set[str]] = {
    "__main__": {"cli"},
    "launch": set(),
    "vllm": {"shipped"},
    "cli": {"api", "pages", "stages", "demo", *STAGES_USE},
    "pages": {"stages", *STAGES_USE},
    "api": {"stages", *STAGES_USE},
    "stages": STAGES_USE,
    "methods": {"calibration", "allocation", "formats", "linalg", "model", "shipped", "arch"},
    "formats": {"allocation", "linalg", "model", "shipped", "arch"},
    "calibration": {"linalg", "model", "shipped", "arch", "artifacts", "resources"},
    "evaluation": {"model", "arch", "artifacts"},
    "training": {"linalg", "model", "shipped", "arch", "resources"},
    "model": {"shipped", "arch", "artifacts"},
    "shipped": set(),
    "arch": {"shipped"},
    "allocation": set(),
    "linalg": set(),
    "resources": set(),
    "artifacts": set(),
    "demo": set(),
    **{name: set() for name in ANYWHERE},
    "recipefile": {"artifacts"},
}
# `import lowrank_compress` registers a quantizer as transformers is imported, and hands out what programs call, when it
# is asked for; so these imports go up.
LATER = {("__init__", "shipped"), ("__init__", "api"), ("__init__", "stages"), ("__init__", "pages")}


def imports(file: Path) -> Iterator[tuple[str, bool]]:
    """Modules that a file imports, and whether inside a function."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    inside = {id(node) for function in functions for node in ast.walk(function)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((name.name, id(node) in inside) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 or part_of(file) == "shipped", f"{file} has a relative import in line {node.lineno}"
            folder = file.relative_to(ROOT.parent).parts[: -node.level] if node.level else ()
            base = ".".join([*folder, *([node.module] if node.module else [])])
            names = [f"{base}.{name.name}" for name in node.names] if base == PACKAGE else [base]
            yield from ((name, id(node) in inside) for name in names)


def part(module: str) -> str:
    """The folder or file of the package that a module of it is in."""
    return [*module.split("."), "__init__"][1]


def part_of(file: Path) -> str:
    return file.relative_to(ROOT).parts[0].removesuffix(".py")


def test_every_folder_has_its_place():
    assert {part_of(file) for file in FILES} == set(BELOW)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_go_down(file: Path):
    here = part_of(file)
    for module, _ in imports(file):
        if module.split(".")[0] == PACKAGE and (here, part(module)) not in LATER:
            known = part(module) if part(module) in BELOW else "__init__"  # a name of the package itself
            assert known in BELOW[here] | ANYWHERE | {here}, f"{here} imports {module}"


@pytest.mark.parametrize(
    "file",
    [file for file in FILES if part_of(file) != "cli"],  # commands import what is slow when they run
    ids=lambda file: str(file.relative_to(ROOT)),
)
def test_the_package_imports_itself_at_the_top_of_files_only(file: Path):
    lazy = [module for module, inside in imports(file) if inside and module.split(".")[0] == PACKAGE]
    assert lazy == []


def test_the_file_shipped_in_checkpoints_needs_only_torch_and_transformers(tmp_path: Path):
    shipped = tmp_path / "modeling.py"
    shipped.write_text(joined(), encoding="utf-8")
    modules = [node for node in ast.walk(ast.parse(joined())) if isinstance(node, ast.ImportFrom)]
    assert not any(node.level for node in modules)
    roots = {module.split(".")[0] for module, _ in imports(shipped)}
    assert roots - set(sys.stdlib_module_names) == {"torch", "transformers"}


@pytest.mark.parametrize("module", [PACKAGE, f"{PACKAGE}.cli.main", f"{PACKAGE}.config", f"{PACKAGE}.arch.table"])
def test_nothing_slow_is_imported_at_start(module: str):
    slow = ("torch", "transformers", "numpy", "scipy", "datasets", "safetensors", "lm_eval", "accelerate")
    code = f"import sys, {module}; print([name for name in {slow} if name in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
