"""A real language model, half a billion elements: run by hand, before changes of quality, loading or speed are done.

    LRC_REAL_MODELS=DIRECTORY pytest -m real

DIRECTORY holds ``qwen2.5-coder-0.5b``. About half an hour on two cores.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.runs import done

NAME = "LRC_REAL_MODELS"
WINDOWS = ("--seq-len", 512, "--limit", 24)

pytestmark = [
    pytest.mark.real,
    pytest.mark.assets,
    pytest.mark.skipif(NAME not in os.environ, reason=f"needs {NAME}, a directory with real models"),
]


@pytest.fixture(scope="module")
def model() -> Path:
    return Path(os.environ.get(NAME, "")) / "qwen2.5-coder-0.5b"


@pytest.fixture(scope="module")
def texts(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two halves of WikiText-2: one to calibrate on, 60 kB of the other to measure on."""
    text = (assets / "text" / "wikitext2-valid.txt").read_text(encoding="utf-8")
    place = tmp_path_factory.mktemp("texts")
    (place / "calibration.txt").write_text(text[: len(text) // 2], encoding="utf-8")
    (place / "heldout.txt").write_text(text[len(text) // 2 :][:60_000], encoding="utf-8")
    return place / "calibration.txt", place / "heldout.txt"


@pytest.fixture(scope="module")
def run(model: Path, texts: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "auto"
    calibration = ("--calibration", texts[0], "--samples", 24, "--seq-len", 512)
    done("compress", model, "--method", "auto", "--ratio", 0.2, *calibration, "--out", out)
    return out


def test_auto_keeps_what_was_measured(run: Path, texts: tuple[Path, Path]) -> None:
    """Measured: dense 40.6, auto 47.2, svd-llm 79.7; the bound is a quarter of svd-llm's excess cross-entropy."""
    (found,) = done("eval", run, "--perplexity", texts[1], *WINDOWS, "--json").json["perplexity"].values()
    excess = torch.tensor(found["compressed"] / found["dense"]).log()
    assert float(excess) < 0.25 * float(torch.tensor(79.71 / 40.61).log())


def test_it_generates_with_and_without_a_cache_alike(run: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    compressed = AutoModelForCausalLM.from_pretrained(run / "model", dtype=torch.float32)
    ids = tokenizer("def fibonacci(n):\n", return_tensors="pt").input_ids
    said = [compressed.generate(ids, max_new_tokens=12, do_sample=False, use_cache=cache) for cache in (True, False)]
    assert said[0].equal(said[1])
    assert all(entry["state"] in ("intact", "dropped") for entry in done("verify", run, "--json").json["files"])
