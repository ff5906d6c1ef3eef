"""The model card: what it takes over from the original, what it says, and that it is always the same."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
import yaml

from lowrank_compress.stages.card import measurements
from tests.runs import Tiny, done, refused, results
from tests.tiny import save_tiny

Finished = Callable[[str], Path]
LICENCE = "Do as you like, and name us.\n"
HEADER = """---
license: other
license_name: as-you-like
license_link: https://example.org/licence
language: [en, de]
base_model: somebody/else
evil: !!python/object/apply:os.system [echo]
---
# A model
"""

PARTS = ("`query-key`", "`value-output`", "`mlp`")


def header(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("---")[1])


def code(card: str) -> str:
    return card.split("```python\n")[1].split("```")[0]


def test_the_original_is_named_and_its_licence_goes_along(tiny: Tiny, tmp_path: Path) -> None:
    """Of a model of the hub, as it lies in the cache; through every stage that writes a checkpoint."""
    model = tmp_path / "models--some-org--a.model-1b" / "snapshots" / "0123"
    shutil.copytree(tiny.model, model)
    (model / "LICENSE").write_text(LICENCE)
    (model / "README.md").write_text(HEADER.replace("evil: !!python/object/apply:os.system [echo]\n", ""))
    run = tmp_path / "run"
    done("compress", model, *tiny.options(run, "svd-llm")[1:], "--refine")
    done("cast", run, "--dtype", "bfloat16")
    done("quantize", model, "--rounding", "rtn", "--out", run.with_name("dense"))
    kinds = {run / name: "low-rank" for name in ("unrefined", "model", "cast")} | {run.with_name("dense"): "quantized"}
    for place, kind in kinds.items():
        card = (place / "README.md").read_text()
        said = header(card)
        assert said["base_model"] == "some-org/a.model-1b"
        assert said["base_model_relation"] == "quantized"
        assert (said["license"], said["license_name"]) == ("other", "as-you-like")
        assert said["language"] == ["en", "de"]
        assert said["pipeline_tag"] == "text-generation"
        assert "model-index" not in said
        assert kind in said["tags"]
        assert (place / "LICENSE").read_text() == LICENCE
        assert f"# some-org/a.model-1b, {kind}" in card
        assert "The licence of the original holds for it." in card
        assert ("import lowrank_compress" if kind == "low-rank" else "compressed-tensors") in code(card)
    assert done("verify", run, "--json").json["ok"]


def test_what_is_stored_is_told_by_kind(finished: Callable[[str], Path], tiny: Tiny, tmp_path: Path) -> None:
    """One row a kind of matrix or module, whichever blocks have it; more is no loss."""
    card = (finished("modegpt") / "model" / "README.md").read_text()
    rows = [line.split("|")[1:3] for line in card.splitlines() if line.startswith("| `")]
    assert {name.strip(): int(number) for name, number in rows} == dict.fromkeys(PARTS, 2)
    run = tmp_path / "cache"
    said = done("compress", *tiny.options(run, "dense"), "--kv-ratio", "0.5", "--kv-window", "4").out
    assert "19,968 weights became 22,016 stored elements" in said
    assert "Removed" not in said
    card = (run / "model" / "README.md").read_text()
    assert re.search(r"Method `dense \(cache: latent\)`: \d+\.\d\d% more parameters inside the blocks are stored", card)


def test_cards_repeat_and_know_nothing_of_places(tiny: Tiny, tmp_path: Path) -> None:
    runs = []
    for name in ("one", "other"):
        shutil.copytree(tiny.model, tmp_path / name / "model")
        runs.append(tmp_path / name / "run")
        done("compress", tmp_path / name / "model", *tiny.options(runs[-1], "svd")[1:])
    assert results(runs[0]) == results(runs[1])
    card = (runs[0] / "model" / "README.md").read_text()
    assert str(tmp_path) not in card
    assert "base_model" not in header(card)
    assert "licence" not in card
    assert '`LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")`' in card
    report = json.loads((runs[0] / "model" / "lowrank.json").read_text())
    rows = [line.split("|")[1:5] for line in card.splitlines() if line.startswith("| `")]
    assert [row[0].strip(" `") for row in rows] == [name.rpartition(".")[2] for name in report["matrices"]][:7]
    kept = [each for name, each in report["matrices"].items() if name.endswith("up_proj")]
    share = sum(each["stored"] for each in kept) / sum(each["dense"] for each in kept)
    assert f"| `up_proj` | 2 | {share:.1%} | pair (2×) |" in card


@pytest.mark.parametrize("text", ["no header", "---\n: [\n---\n", "---\n- a list\n---\n", HEADER, "\udcff"])
def test_a_card_that_cannot_be_read_is_none(text: str, tiny: Tiny, tmp_path: Path) -> None:
    shutil.copytree(tiny.model, tmp_path / "model")
    (tmp_path / "model" / "README.md").write_text(text, errors="surrogateescape")
    done("compress", tmp_path / "model", *tiny.options(tmp_path / "run", "svd")[1:])
    said = header((tmp_path / "run" / "model" / "README.md").read_text())
    assert not {"license", "language", "base_model"} & set(said)


@pytest.mark.parametrize(("task", "pipeline"), [("classification", "text-classification"), ("lm", "text-generation")])
def test_the_snippet_names_the_right_class(task: Any, pipeline: str, tmp_path: Path) -> None:
    model = save_tiny("bert", tmp_path / "model", task)
    run = tmp_path / "run"
    done("compress", model, "--method", "svd", "--out", run)
    card = (run / "model" / "README.md").read_text()
    assert header(card)["pipeline_tag"] == pipeline
    names: dict[str, Any] = {}
    exec(code(card).replace("path/to/this/checkpoint", str(run / "model")), names)
    stock = (
        transformers.AutoModelForSequenceClassification
        if task == "classification"
        else transformers.AutoModelForCausalLM
    )
    assert type(names["model"]).__name__ == stock._model_mapping[type(names["model"].config)].__name__  # pyright: ignore


def test_what_was_measured_is_in_the_card_of_the_run(tiny: Tiny, finished: Finished, tmp_path: Path) -> None:
    run = finished("svd")
    assert "Nothing was measured" in done("card", run).out
    first = done("eval", run, "--perplexity", tiny.heldout, "--json").json["perplexity"][str(tiny.heldout)]
    card = done("card", run).out
    (entry,) = header(card)["model-index"]
    (result,) = entry["results"]
    assert result["dataset"] == {"name": "heldout.txt", "type": "heldout.txt"}
    assert result["metrics"] == [{"type": "perplexity", "value": pytest.approx(first["compressed"])}]
    line = f"| perplexity | heldout.txt {first['tokens']:,} tokens | {first['compressed']:.4g} | {first['dense']:.4g} |"
    assert line in card
    assert "Nothing was measured" not in card
    out = tmp_path / "card.md"
    done("card", run, "--out", out)
    assert out.read_text() == card
    assert "exists. Choose another name" in refused("card", run, "--out", out)
    done("card", run, "--out", out, "--overwrite")
    # What was measured of a checkpoint before is no measurement of this one.
    done("cast", run, "--dtype", "bfloat16")
    assert "model-index" not in done("card", run).out
    assert "is no run" in refused("card", tiny.model)


def test_what_an_embedding_model_was_measured_on() -> None:
    values = {"compressed": 0.7, "dense": 0.75, "n": 12, "cosine": 0.99}
    alone = {"dense": 0.75, "n": 12, "cosine": None}
    empty: dict[str, Any] = {"perplexity": {}, "classification": {}, "tasks": {}}
    found = list(measurements({"evaluations": {"0": {**empty, "sts": {"a/pairs.tsv": values, "b.tsv": alone}}}}))
    assert [(row["metric"], row["name"], row["amount"], row["compressed"], row.get("dense")) for row in found] == [
        ("cosine to dense", "pairs.tsv", "12 examples", 0.99, None),
        ("spearmanr", "pairs.tsv", "12 examples", 0.7, 0.75),
    ]
