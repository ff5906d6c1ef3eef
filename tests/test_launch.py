"""`python -m lowrank_compress.launch`: another program, with compressed checkpoints known to transformers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.shipped.test_loading import ROOT, write

PROGRAM = """
import sys
from transformers import AutoModelForCausalLM

if __name__ == "__main__":
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
    print(type(model.model.layers[0].mlp.up_proj).__module__, *sys.argv[2:])
    sys.exit(3)
"""


def launch(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lowrank_compress.launch", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(cwd)]), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_a_program_that_knows_nothing_of_us_loads_a_compressed_checkpoint(tmp_path: Path) -> None:
    directory, _ = write(tmp_path / "model", "llama")
    (tmp_path / "stranger.py").write_text(PROGRAM)
    said = launch("stranger", directory, "--flag", cwd=tmp_path)
    assert said.stdout.split() == ["lowrank_compress.shipped.linear", "--flag"], said.stderr
    assert said.returncode == 3


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ((), 2, "usage: python -m lowrank_compress.launch MODULE"),
        (("--model", "x"), 2, "usage:"),
        (("no_such_module_here",), 2, "There is no module no_such_module_here here; expected the name"),
        (("no_such_package.inner",), 2, "There is no module no_such_package.inner here"),
        (("--help",), 0, "usage:"),
    ],
)
def test_what_it_says_where_there_is_no_module(
    arguments: tuple[str, ...], code: int, message: str, tmp_path: Path
) -> None:
    said = launch(*arguments, cwd=tmp_path)
    assert said.returncode == code
    assert message in (said.stderr if code else said.stdout)
