"""One file of many: what a checkpoint carries."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import lowrank_compress
from lowrank_compress.shipped import join
from lowrank_compress.shipped.config import REMOTE_FILE
from lowrank_compress.shipped.join import HERE, joined
from lowrank_compress.shipped.saving import write_remote_code

ROOT = Path(lowrank_compress.__file__).parents[1]


def test_a_checkpoint_carries_the_joined_files_byte_for_byte(tmp_path: Path) -> None:
    written = write_remote_code(tmp_path / "new")
    assert written.name == REMOTE_FILE
    assert written.read_bytes() == joined().encode()
    written.write_text("# another")
    assert write_remote_code(tmp_path / "new").read_bytes() == joined().encode()


def test_every_shipped_file_is_in_it_whole() -> None:
    files = {path.relative_to(HERE).as_posix() for path in HERE.rglob("*.py") if path.name != "__init__.py"} - {
        "join.py"
    }
    for file in files:
        last = (HERE / file).read_text(encoding="utf-8").partition("from __future__ import annotations\n")[2]
        statements = [line for line in last.splitlines() if line and not line.startswith(("from ", "import "))]
        assert "\n".join(statements) in "\n".join(line for line in joined().splitlines() if line), file
        assert f"\n# {file}: " in joined()


def test_it_is_formatted_and_linted_like_the_rest(tmp_path: Path) -> None:
    written = write_remote_code(tmp_path)
    ruff = [sys.executable, "-m", "ruff"]
    for command in (["format", "--check"], ["check", "--ignore", "TID253"]):
        done = subprocess.run(
            [*ruff, *command, "--config", str(ROOT / "pyproject.toml"), "--no-cache", str(written)],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copytree(HERE, tmp_path / "shipped")
    return tmp_path / "shipped"


def append(file: Path, text: str) -> None:
    file.write_text(file.read_text(encoding="utf-8") + text, encoding="utf-8")


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("swap.py", "\nimport torch\n", "swap.py has an import below something else"),
        ("swap.py", "\ndef register(): ...\n", "both define register"),
        ("traits.py", "\nfrom .swap import find as other\n", "traits.py has an import below something else"),
    ],
)
def test_what_cannot_be_joined(folder: Path, file: str, text: str, message: str) -> None:
    append(folder / file, text)
    with pytest.raises(ValueError, match=message):
        joined(folder)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("from .swap import check_indices as check", "imports check_indices under another name, or a file as a whole"),
        ("from . import swap", "imports swap under another name, or a file as a whole"),
        ("from .remote import LowRankModel", "remote.py imports itself by way of another file"),
    ],
)
def test_imports_that_cannot_be_joined(folder: Path, line: str, message: str) -> None:
    file = folder / "quantizer.py"
    file.write_text(file.read_text(encoding="utf-8").replace("import torch\n", f"import torch\n{line}\n", 1))
    with pytest.raises(ValueError, match=message):
        joined(folder)


def test_imports_are_merged_sorted_and_wrapped(tmp_path: Path) -> None:
    names = ", ".join(f"a_rather_long_name_of_number_{i}" for i in range(6))
    (tmp_path / "remote.py").write_text(
        f'"""Last."""\n\nfrom torch import nn, {names}\nimport torch.nn\nfrom os import sep\n'
        "\nfrom .sub.a import A\n\nB = A\n"
    )
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.py").write_text('"""First."""\n\nimport os\nfrom torch import Tensor, SIZE\n\nA = 1\n')
    text = joined(tmp_path)
    wrapped = "".join(f"    {name},\n" for name in ["SIZE", "Tensor", *names.split(", "), "nn"])
    assert text == (
        f"{join.HEADER}\nfrom __future__ import annotations\n\nimport os\nfrom os import sep\n\nimport torch.nn\n"
        f"from torch import (\n{wrapped})\n\n# sub/a.py: First.\n\n\nA = 1\n\n\n# remote.py: Last.\n\n\nB = A\n"
    )


def test_long_summaries_are_wrapped(tmp_path: Path) -> None:
    (tmp_path / "remote.py").write_text(f'"""{"Some words " * 15}end."""\n\nA = 1\n')
    comment = [line for line in joined(tmp_path).splitlines() if line.startswith("# ")]
    assert len(comment) == 2
    assert max(map(len, comment)) <= 120
    assert " ".join(line.removeprefix("# ") for line in comment) == f"remote.py: {'Some words ' * 15}end."
