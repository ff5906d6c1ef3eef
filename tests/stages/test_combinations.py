"""Every method with every allocator and storage: the budget is kept, and the report counts what is stored."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from lowrank_compress.allocation.table import ALLOCATORS
from lowrank_compress.calibration.statistics import ENOUGH
from lowrank_compress.formats.table import FORMATS
from lowrank_compress.methods.experts import ExpertMethod
from lowrank_compress.methods.linear import PLAIN, LinearMethod
from lowrank_compress.methods.table import METHODS
from lowrank_compress.recipe import Recipe
from lowrank_compress.stages import factorize
from lowrank_compress.stages.plan import make_plan
from lowrank_compress.stages.run import Run
from tests.runs import FEW, Tiny, done, refused
from tests.tiny import save_tiny, tiny_model, tiny_text

RATIO = 0.4


def check_counts(run: Path) -> dict:
    """Compare the report with the tensors in the checkpoint, biases that were there before aside."""
    report = json.loads((run / "model" / "lowrank.json").read_text())
    tensors = load_file(run / "model" / "model.safetensors")
    modules: dict[str, int] = {}
    for name, matrix in report["matrices"].items():
        module = name.partition(":")[0]
        modules[module] = modules.get(module, 0) + matrix["stored"]
    if all(entry["format"] != "width" for entry in report["matrices"].values()):
        for module, stored in modules.items():
            names = [name for name in tensors if name.startswith(f"{module}.") and name != f"{module}.bias"]
            assert sum(tensors[name].numel() for name in names) == stored, module
    inside = {name: tensor for name, tensor in tensors.items() if ".layers." in name or ".layer." in name}
    weights = [t for name, t in inside.items() if "norm" not in name.lower() and not name.endswith(".bias")]
    assert sum(weight.numel() for weight in weights) == report["stored_elements"]
    assert report["reached_ratio"] >= report["asked_ratio"]
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    return report


LINEAR = [name for name, method in METHODS.items() if isinstance(method, LinearMethod)]
EXPERTS = [name for name, method in METHODS.items() if isinstance(method, ExpertMethod)]
MODULES = [name for name in METHODS if name not in (*LINEAR, *EXPERTS, "auto")]
# Ratios that some can reach by themselves; others at least a tenth.
REACHABLE = {"nystrom": 0.4, "modegpt": RATIO}


# What looks at blocks decides about formats as others do: one storage is enough for it.
WAYS = [(a, s) for a, entry in ALLOCATORS.items() for s in FORMATS if not entry.needs_data or s == "pivot"]


@pytest.mark.slow
@pytest.mark.parametrize(("allocate", "storage"), WAYS)
@pytest.mark.parametrize("method", [*LINEAR, "auto"])
def test_combination(tiny: Tiny, tmp_path: Path, method: str, allocate: str, storage: str):
    run = tmp_path / "run"
    options = ["--allocate", allocate, "--storage", storage, "--ratio", RATIO]
    entry = METHODS[method]
    if isinstance(entry, LinearMethod) and entry.left == entry.right == PLAIN and ALLOCATORS[allocate].needs_data:
        assert "needs calibration data" in refused("compress", *tiny.options(run, method), *options)
        return
    said = done("compress", *tiny.options(run, method), *options, "--json").json
    report = check_counts(run)
    assert said["reached_ratio"] == report["reached_ratio"]
    assert report["claimed_elements"] == 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 72 * 32)
    assert report["reached_ratio"] == pytest.approx(1 - report["stored_elements"] / report["claimed_elements"])
    formats = {matrix["format"] for matrix in report["matrices"].values()}
    possible = {"dense", storage} if storage != "auto" else {"dense", "pair", "pivot"}
    assert formats <= (possible | {"width"} if method == "auto" and ALLOCATORS[allocate].needs_loss else possible)
    assert formats != {"dense"}


@pytest.mark.parametrize(
    ("allocate", "metric"), [("uniform", "gram"), ("welore", "gram"), ("block-influence", "gram"), ("loss", "kfac")]
)
@pytest.mark.parametrize("method", MODULES)
def test_module_methods(tiny: Tiny, tmp_path: Path, method: str, allocate: str, metric: str):
    run = tmp_path / "run"
    options = ["--allocate", allocate, "--metric", metric, "--ratio", REACHABLE.get(method, 0.1)]
    if allocate == "welore":
        assert "singular values of single matrices" in refused("compress", *tiny.options(run, method), *options)
        return
    done("compress", *tiny.options(run, method), *options)
    report = check_counts(run)
    assert report["unit"] == ("nats" if metric == "kfac" else "relative")
    formats = {matrix["format"] for matrix in report["matrices"].values()}
    assert formats <= {"width", "dense"}
    assert "width" in formats


@pytest.mark.slow
@pytest.mark.parametrize("method", ["auto", "modegpt", "svd-llm"])
def test_ranks_round_to_a_multiple_within_the_budget(tiny: Tiny, tmp_path: Path, method: str):
    run = tmp_path / "run"
    done("compress", *tiny.options(run, method), "--round-to", 4, "--ratio", 0.3)
    ranks = [entry["rank"] for entry in check_counts(run)["matrices"].values() if entry["rank"] is not None]
    assert ranks
    assert all(rank % 4 == 0 for rank in ranks)


def test_a_multiple_that_leaves_nothing_to_choose(tiny: Tiny, tmp_path: Path):
    said = refused("compress", *tiny.options(tmp_path / "run", "cr"), "--round-to", 8, "--ratio", 0.1)
    assert "Nothing can go. Change the options; or: --round-to 8 is in the way" in said


def labelled(path: Path, rows: int = 40) -> Path:
    texts = tiny_text(60 * rows).split()
    lines = [f"{' '.join(texts[8 * i : 8 * i + 8])}\t{i % 3}" for i in range(rows)]
    path.write_text("sentence\tlabel\n" + "\n".join(lines) + "\n")
    return path


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fwsvd", "kfac", "auto", "svd-llm"])
def test_classifier(tmp_path: Path, method: str):
    model = save_tiny("bert", tmp_path / "bert", "classification")
    data = labelled(tmp_path / "data.tsv")
    columns = ["--text-column", "sentence", "--label-column", "label"]
    run = tmp_path / "run"
    done("compress", model, "--method", method, "--calibration", data, *columns, *FEW, "--out", run)
    check_counts(run)
    heldout = labelled(tmp_path / "heldout.tsv", 30)
    found = done("eval", run, "--classification", heldout, *columns, "--json").json["classification"][str(heldout)]
    assert found["n"] == 30
    dense = AutoModelForSequenceClassification.from_pretrained(model)
    small = AutoModelForSequenceClassification.from_pretrained(run / "model")
    ids = torch.arange(4, 24).view(2, 10)
    with torch.no_grad():
        assert not torch.equal(small(ids).logits, dense(ids).logits)


def test_afm_restores_means_through_biases_without_storing_more(tmp_path: Path, tiny: Tiny):
    model = save_tiny("llama", tmp_path / "biased", attention_bias=True, mlp_bias=True)
    run = tmp_path / "run"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        said = done("compress", model, "--method", "afm", "--calibration", tiny.text, *FEW, "--out", run)
    assert "restores no mean" not in said.err
    check_counts(run)
    dense, small = (load_file(place / "model.safetensors") for place in (model, run / "model"))
    name = "model.layers.0.mlp.up_proj.bias"
    assert dense[name].shape == small[name].shape
    assert not torch.equal(dense[name], small[name])


def test_afm_says_where_it_can_restore_nothing(tiny: Tiny, tmp_path: Path):
    said = done("compress", *tiny.options(tmp_path / "run", "afm"))
    assert "some layers of this model have none" in said.text


def test_the_ratio_may_be_of_the_whole_model(tiny: Tiny, tmp_path: Path):
    said = done("compress", *tiny.options(tmp_path / "run"), "--ratio-of", "model", "--ratio", 0.2, "--json").json
    whole = sum(parameter.numel() for parameter in tiny_model("llama").parameters())
    kept = sum(tensor.numel() for tensor in load_file(tmp_path / "run" / "model" / "model.safetensors").values())
    assert said["reached_ratio"] == pytest.approx(1 - kept / whole)
    assert 0.2 <= said["reached_ratio"] < 0.22


def test_a_tied_head_counts_once(tmp_path: Path, tiny: Tiny):
    model = save_tiny("llama", tmp_path / "tied", tie_word_embeddings=True)
    run = tmp_path / "run"
    options = ["--calibration", tiny.text, *FEW, "--out", run, "--ratio-of", "model", "--ratio", 0.2]
    said = done("compress", model, *options, "--json").json
    whole = sum(parameter.numel() for parameter in tiny_model("llama", tie_word_embeddings=True).parameters())
    tensors = load_file(run / "model" / "model.safetensors")
    assert said["reached_ratio"] == pytest.approx(1 - sum(tensor.numel() for tensor in tensors.values()) / whole)


@pytest.mark.slow
@pytest.mark.versions
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_output_dtype(tiny: Tiny, tmp_path: Path, dtype: str):
    run = tmp_path / "run"
    done("compress", *tiny.options(run), "--dtype", dtype)
    kinds = {tensor.dtype for tensor in load_file(run / "model" / "model.safetensors").values()}
    assert kinds == {torch.int32, getattr(torch, dtype)}  # indices are of the smaller kind
    assert AutoModelForCausalLM.from_pretrained(run / "model", dtype="auto").dtype == getattr(torch, dtype)


@pytest.mark.slow
def test_a_bfloat16_checkpoint_stays_one(tiny: Tiny, tmp_path: Path):
    model = save_tiny("llama", tmp_path / "model", dtype=torch.bfloat16)
    run = tmp_path / "run"
    done("compress", model, "--calibration", tiny.text, *FEW, "--out", run)
    tensors = load_file(run / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.int32, torch.bfloat16}


def test_fewer_tokens_than_dimensions_warn_and_stay_sensible(tiny: Tiny, tmp_path: Path):
    run, text = tmp_path / "run", tmp_path / "short.txt"
    text.write_text(tiny_text(60))
    said = done(
        *(
            "compress",
            tiny.model,
            "--method",
            "svd-llm",
            "--calibration",
            text,
            "--seq-len",
            16,
            "--out",
            run,
            "--ratio",
            0.6,
        )
    )
    assert "16 tokens for the 32 dimensions of model.layers.0.self_attn.q_proj" in said.text
    assert f"here --samples {ENOUGH * 32 // 16}" in said.text
    check_counts(run)
    # On the few tokens themselves, a rank above their number loses next to nothing.
    report = json.loads((run / "model" / "lowrank.json").read_text())
    assert all(-1e-9 < matrix["predicted_loss"] < 0.7 for matrix in report["matrices"].values())
    found = done("eval", run, "--perplexity", tiny.heldout, "--json").json["perplexity"][str(tiny.heldout)]
    assert 1 < found["compressed"] < 50 * found["dense"]


@pytest.mark.slow
def test_more_shards_give_the_same_tensors(tiny: Tiny, tmp_path: Path):
    run = tmp_path / "run"
    done("compress", *tiny.options(run))
    plan = make_plan(Recipe(model=str(tiny.model), calibration=str(tiny.text), samples=8, seq_len=32))
    config = plan.factorize.model_copy(update={"shard_bytes": 20_000})
    out = tmp_path / "sharded"
    factorize.run(config, factorize.Inputs(plan.subject.model, Run(run).scores), out)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    whole = load_file(run / "unrefined" / "model.safetensors")
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 2
    parts = {name: load_file(out / name) for name in shards}
    assert set(index["weight_map"]) == set(whole)
    assert all(torch.equal(parts[shard][name], whole[name]) for name, shard in index["weight_map"].items())
    ids = torch.arange(4, 24).view(2, 10)
    with torch.no_grad():
        logits = [AutoModelForCausalLM.from_pretrained(path)(ids).logits for path in (out, run / "unrefined")]
    assert torch.equal(*logits)
