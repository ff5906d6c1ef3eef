"""A code model of StarCoder's proportions, LoRD's own case: one key-value head for twelve, a wide MLP."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest
import torch

from tests import ordinary, tiny
from tests.ordinary import load, tokens
from tests.runs import done
from tests.tiny import save_tiny

SIZES = {"n_embd": 96, "n_head": 12, "n_inner": 384, "n_layer": 2, "multi_query": True, "tie_word_embeddings": True}


@pytest.mark.parametrize("method", ["svd", "modegpt"])
def test_from_code_to_a_smaller_model(method: str, tmp_path: Path) -> None:
    model = save_tiny("gpt_bigcode", tmp_path / "dense", **SIZES)
    code = tmp_path / "code.py"
    code.write_text(inspect.getsource(tiny))
    other = tmp_path / "other.py"
    other.write_text(inspect.getsource(ordinary))
    run = tmp_path / "run"
    data = ["--calibration", code, "--samples", "32", "--seq-len", "64"]
    done("compress", model, "--method", method, "--ratio", "0.2", *data, "--out", run)
    report = json.loads((run / "model" / "lowrank.json").read_text())
    shapes = {name.rpartition(".c_attn:")[2]: entry["shape"] for name, entry in report["matrices"].items()}
    if method == "svd":
        assert (shapes["q"], shapes["k"], shapes["v"]) == ([96, 96], [8, 96], [8, 96])
    assert report["reached_ratio"] >= 0.2
    found = done("eval", run, "--perplexity", other, "--json").json
    (perplexity,) = found["perplexity"].values()
    assert perplexity["compressed"] != perplexity["dense"]
    cache = found["size"]["kv_bytes_per_token"]
    assert cache["dense"] == 2 * 2 * 8 * 4  # layers, keys and values, one head's size, float32
    assert (cache["compressed"] < cache["dense"]) == (method == "modegpt")
    small = load(run / "model", "lm")
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    made = [small.generate(torch.stack(tokens(9, 9)), use_cache=cached, **options) for cached in (True, False)]  # pyright: ignore
    assert torch.equal(*made)
