"""How much commands say: results alone, as usual, what is decided, everything."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import transformers
import typer

from lowrank_compress.cli.main import app
from tests.runs import Tiny, done, lrc, refused

GROUP: Any = typer.main.get_command(app)


def test_results_alone(tiny: Tiny, tmp_path: Path) -> None:
    said = done("compress", *tiny.options(tmp_path / "run", "svd"), "-q")
    assert said.err == ""
    assert "Checkpoint: " in said.out
    # Errors are said all the same.
    assert "is the run of another recipe" in refused("-q", "compress", *tiny.options(tmp_path / "run", "fwsvd"))


def test_what_is_decided(tiny: Tiny, tmp_path: Path) -> None:
    options = tiny.options(tmp_path / "run", "svd")
    said = done("compress", *options, "-v")
    assert f"Reading {tiny.model}/model.safetensors (0.1 MB)" in said.text
    assert "Plan: LlamaForCausalLM of 2 blocks with 14 matrices; calibrate " in said.text
    assert "model.layers.1.mlp.down_proj (32×72): pair 15" in said.err
    assert "factorize took " in said.text
    assert "peak of memory" not in said.err
    # Before the command it is the same; and it is for this command alone.
    again = done("-v", "compress", *options)
    assert f"{tmp_path}/run/model is there already, from the same recipe (" in again.text
    assert "there already" not in done("compress", *options).text


def test_everything(tiny: Tiny, tmp_path: Path) -> None:
    said = done("compress", *tiny.options(tmp_path / "run", "svd"), "-vv")
    assert "factorize: 1 of 2, peak of memory" in said.err
    assert transformers.logging.get_verbosity() == logging.INFO
    done("list", "stages")
    done("show", tmp_path / "run")
    assert transformers.logging.get_verbosity() == logging.ERROR


def test_opposites() -> None:
    said = lrc("list", "stages", "-q", "--verbose")
    assert said.code == 2
    assert "pass one of them" in " ".join(said.err.replace("│", " ").split())


@pytest.mark.parametrize("command", GROUP.commands)
def test_every_command_takes_both(command: str) -> None:
    names = {name for each in GROUP.commands[command].params for name in each.opts}
    assert {"-v", "--verbose", "-q", "--quiet"} <= names


def test_what_a_user_names_is_said_as_it_is(tiny: Tiny, tmp_path: Path) -> None:
    """Colons around a word make no picture: not in a result, a table, a title or an error."""
    model = tmp_path / "a:train:b"
    model.symlink_to(tiny.model)
    said = done("eval", model, "--perplexity", tiny.heldout, "--limit", 1)
    assert "a:train:b" in said.out.replace("\n", "")
    shown = done(
        "compress", tiny.model, "--calibration", "hf:some/data::train:2", "--dry-run", "--out", tmp_path / "run"
    )
    assert "hf:some/data::train" in shown.out.replace("\n", "")
    assert "b:train:c does not exist" in refused("eval", tiny.model, "--perplexity", tmp_path / "b:train:c")
    for text in (said.out, said.err, shown.out):
        assert "\N{TRAM CAR}" not in text
        assert "\N{RAILWAY CAR}" not in text
