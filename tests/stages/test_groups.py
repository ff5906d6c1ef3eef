"""Groups are what an architecture declares: another division of a block needs an entry and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lowrank_compress.arch.spec import QUERY_KEY, VALUE_OUTPUT, Group
from tests import families
from tests.runs import Tiny, done, refused
from tests.tiny import tiny_tokenizer


@pytest.fixture
def divided(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An OLMo 2 whose MLP has two groups, as a package for it might declare."""
    reading, writing = (
        Group("reading", ("gate", "up"), "reading", "gate and up"),
        Group("down", ("down",), "down", "down"),
    )
    entry = families.OLMO2.__class__(
        **{name: getattr(families.OLMO2, name) for name in ("name", "model_types", "blocks", "attention")},
        projections=families.OLMO2.projections,
        traits=families.OLMO2.traits,
        groups=(QUERY_KEY, VALUE_OUTPUT, reading, writing),
    )
    monkeypatch.setattr(families, "DIVIDED", entry, raising=False)
    families.register(monkeypatch, "DIVIDED")
    families.family("olmo2").save_pretrained(tmp_path / "model")
    tiny_tokenizer(tmp_path / "model")
    return tmp_path / "model"


def test_each_group_has_a_method_of_its_own(divided: Path, tiny: Tiny, tmp_path: Path) -> None:
    methods = ("--method", "svd", "--for", "down=dense", "--for", "reading=svd-llm")
    few = ("--calibration", tiny.text, "--samples", 4, "--seq-len", 16, "--ratio", 0.2)
    done("compress", divided, *methods, *few, "--out", tmp_path / "run")
    matrices = json.loads((tmp_path / "run" / "model" / "lowrank.json").read_text())["matrices"]
    assert not any(name.endswith("down_proj") for name in matrices)
    assert {name.rpartition(".")[2] for name in matrices} == {
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("gate_proj", "up_proj"),
    }
    done("export", tmp_path / "run", "--dense", tmp_path / "dense")


def test_a_group_that_there_is_not_is_named(divided: Path, tmp_path: Path) -> None:
    said = refused("compress", divided, "--method", "svd", "--mlp", "svd", "--out", tmp_path / "run")
    assert "mlp" in said
    assert "reading" in said


def test_how_queries_are_normalised_is_said_as_it_is(divided: Path, tiny: Tiny, tmp_path: Path) -> None:
    few = ("--calibration", tiny.text, "--samples", 4, "--seq-len", 16, "--ratio", 0.2)
    said = refused("compress", divided, "--method", "svd", "--qk", "cr", *few, "--out", tmp_path / "run")
    assert "they are normalised over all heads together" in said
    assert "--qk kfac" in said
