"""Native exports: stock checkpoints of the smaller shape, which compute the same."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from lowrank_compress.model.native import WIDTHS
from tests.runs import FEW, Tiny, contents, done, refused
from tests.shipped.test_loading import python
from tests.tiny import save_tiny

torch.set_num_threads(1)
EQUAL = ("--method", "nystrom", "--attention", "dense", "--allocate", "equal-widths", "--ratio", "0.2")
IDS = torch.tensor([[5, 9, 2, 30, 41, 7, 3]])

# Runs without the package, and without remote code.
STOCK = """
    import sys, torch
    sys.modules["lowrank_compress"] = None
    torch.set_num_threads(1)
    import transformers
    model, info = getattr(transformers, sys.argv[1]).from_pretrained(sys.argv[2], output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    with torch.no_grad():
        torch.save(model.eval()(input_ids=torch.tensor([[5, 9, 2, 30, 41, 7, 3]])).logits, sys.argv[3])
"""


@pytest.mark.parametrize(
    ("kind", "task"),
    [("llama", "lm"), ("gpt2", "lm"), ("phi3", "lm"), ("opt", "lm"), ("gpt_neox", "lm"), ("bert", "classification")],
)
def test_a_stock_model_computes_the_same(kind: str, task: str, tiny: Tiny, tmp_path: Path) -> None:
    text: tuple[object, ...] = (tiny.text,)
    if task == "classification":
        table = tmp_path / "labelled.tsv"
        lines = tiny.text.read_text().replace("\n", " ").split(". ")
        rows = [f"{line}\t{number % 3}" for number, line in enumerate(lines) if line.strip()]
        table.write_text("\n".join(["text\tlabel", *rows]) + "\n")
        text = (table,)
    shards = {"max_shard_size": "20KB"} if kind == "llama" else {}
    model = save_tiny(kind, tmp_path / kind, task, **shards)  # pyright: ignore[reportArgumentType]
    run, out = tmp_path / "run", tmp_path / "native"
    done("compress", model, *EQUAL, "--calibration", *text, *FEW, "--out", run)
    assert str(out) in done("export", run, "--native", out).out
    auto = AutoModelForCausalLM if task == "lm" else AutoModelForSequenceClassification
    settings, before = (json.loads((place / "config.json").read_text()) for place in (out, model))
    assert not {"quantization_config", "auto_map"} & set(settings)
    (key,) = [key for key in WIDTHS if settings.get(key) != before.get(key)]
    assert settings[key] < before[key]
    assert (out / "tokenizer.json").exists()
    found, expected = auto.from_pretrained(out).eval(), auto.from_pretrained(run / "model").eval()
    assert type(found) is type(expected)
    assert sum(weight.numel() for weight in found.parameters()) < sum(
        weight.numel() for weight in auto.from_pretrained(model).parameters()
    )
    with torch.no_grad():
        assert torch.equal(found(input_ids=IDS).logits, expected(input_ids=IDS).logits)
    if kind == "llama":
        (tmp_path / "cache").mkdir()
        python(STOCK, auto.__name__, out, tmp_path / "logits.pt", cache=tmp_path / "cache")
        with torch.no_grad():
            assert torch.equal(torch.load(tmp_path / "logits.pt"), expected(input_ids=IDS).logits)
        first = contents(out)
        assert "is not empty" in refused("export", run, "--native", out)
        done("export", run, "--native", out, "--overwrite")
        assert contents(out) == first
        assert "--native" in refused("export", run, "--native", run / "model", "--overwrite")


def test_what_no_stock_config_describes_is_refused(pristine: Callable[[str], Path], tiny: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "native"
    assert "is stored as factors" in refused("export", pristine("svd"), "--native", out)
    message = refused("export", pristine("modegpt"), "--native", out)
    assert "has narrower heads" in message
    assert "--allocate equal-widths" in message
    run = tmp_path / "run"
    unequal = [*EQUAL[:4], "--allocate", "block-influence", "--temperature", "0.5", *EQUAL[6:]]
    done("compress", tiny.model, *unequal, "--calibration", tiny.text, *FEW, "--out", run)
    widths = json.loads((run / "model" / "config.json").read_text())["quantization_config"]["dense_shapes"]
    assert widths["model.layers.0.mlp.up_proj"] != widths["model.layers.1.mlp.up_proj"]
    message = refused("export", run, "--native", out)
    assert "its blocks are not alike" in message
    assert "--allocate equal-widths" in message
    assert "is native already" in refused("export", tiny.model, "--native", out)
    assert "Expected either --dense PATH or --native PATH, got none" in refused("export", run)
    assert "got both" in refused("export", run, "--native", out, "--dense", tmp_path / "dense")
    assert not out.exists()


@pytest.mark.parametrize("ratio", [0.2, 0.5])
def test_alternatives_are_chosen_for_all_blocks_where_these_are_to_be_alike(
    ratio: float, tiny: Tiny, tmp_path: Path
) -> None:
    done("compress", *tiny.options(tmp_path / "run"), "--allocate", "equal-widths", "--ratio", ratio)
    ranks = json.loads((tmp_path / "run" / "scores" / "ranks.json").read_text())["matrices"]
    kinds: dict[str, list[object]] = {}
    for name, entry in ranks.items():
        kinds.setdefault(re.sub(r"\d+", "*", name), []).append(entry)
    assert all(len(entries) == 2 and entries[0] == entries[1] for entries in kinds.values())
