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
from tests.moe import save_moe
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


@pytest.mark.slow
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


COUNTS = {
    "gpt_oss": "num_local_experts",
    "mixtral": "num_local_experts",
    "qwen2_moe": "num_experts",
    "qwen3_moe": "num_experts",
    "olmoe": "num_experts",
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(COUNTS))
def test_a_stock_model_of_fewer_experts_computes_the_same(kind: str, tiny: Tiny, tmp_path: Path) -> None:
    model, run, out = save_moe(kind, tmp_path / kind), tmp_path / "run", tmp_path / "native"
    before = json.loads((model / "config.json").read_text())
    before[COUNTS[kind]] = before.pop("num_local_experts", before.get(COUNTS[kind]))  # as on the hub
    (model / "config.json").write_text(json.dumps(before))
    done("compress", model, "--method", "reap", "--ratio", "0.15", "--calibration", tiny.text, *FEW, "--out", run)
    done("export", run, "--native", out)
    settings = json.loads((out / "config.json").read_text())
    assert not {"quantization_config", "auto_map"} & set(settings)
    assert before[COUNTS[kind]] > settings[COUNTS[kind]] >= settings["num_experts_per_tok"]
    assert {key for key in before if settings[key] != before[key]} == {COUNTS[kind]}
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(run / "model").eval()(input_ids=IDS).logits
        dense = AutoModelForCausalLM.from_pretrained(model).eval()(input_ids=IDS).logits
    (tmp_path / "cache").mkdir()
    python(STOCK, "AutoModelForCausalLM", out, tmp_path / "logits.pt", cache=tmp_path / "cache")
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(expected, dense, atol=1e-3)


def test_experts_that_no_stock_config_describes_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    model, run, out = save_moe("mixtral", tmp_path / "mixtral"), tmp_path / "run", tmp_path / "native"
    few = ("--calibration", tiny.text, *FEW, "--out", run)
    done("compress", model, "--method", "reap", "--ratio", "0.15", *few)
    ranks = run / "scores" / "ranks.json"
    found = json.loads(ranks.read_text())
    found["matrices"]["model.layers.0:experts"]["rank"] = 2
    ranks.write_text(json.dumps(found))
    done("factorize", run, "--overwrite")
    message = refused("export", run, "--native", out)
    assert "its blocks have not as many experts each (2 in model.layers.0.mlp.gate, 3 in model.layers.1" in message
    assert "--experts reap --allocate uniform" in message
    done("compress", model, *EQUAL[:-1], "0.2", "--round-to", "1", *few, "--overwrite")
    message = refused("export", run, "--native", out)
    assert re.search(r"its experts are \d+ wide, .* takes rows of a multiple of 16 bytes", message)
    done(
        "compress",
        model,
        *EQUAL[:-1],
        "0.2",
        "--round-to",
        re.findall(r"--round-to (\d+)", message)[0],
        *few,
        "--overwrite",
    )
    done("export", run, "--native", out)
    with torch.no_grad():
        got, expected = (
            AutoModelForCausalLM.from_pretrained(path).eval()(input_ids=IDS).logits for path in (out, run / "model")
        )
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
