"""Models without a head, and directories of sentence-transformers: compressed whole, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

import lowrank_compress
from lowrank_compress import api
from lowrank_compress.calibration.layers import layer_moments
from lowrank_compress.config import CalibrationSet
from lowrank_compress.model.checkpoint import Checkpoint
from lowrank_compress.model.skeleton import Skeleton
from lowrank_compress.model.walk.batch import Batch
from lowrank_compress.stages.samples import calibration_batches, held_out_batches
from tests.runs import Tiny, done, refused
from tests.tiny import tiny_model, tiny_text, tiny_tokenizer

MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
]
SENTENCES: dict[str, Any] = {
    "modules.json": MODULES,
    "config_sentence_transformers.json": {"similarity_fn_name": "cosine"},
    "sentence_bert_config.json": {"max_seq_length": 64},
    "1_Pooling/config.json": {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True},
}
IDS = torch.tensor([[5, 9, 2, 30, 41, 7, 3, 12], [11, 4, 8, 8, 60, 23, 90, 5]])


def saved(place: Path, model_type: str = "bert") -> tuple[Path, list[str]]:
    """Write an embedding model and a text for it."""
    path = place / "dense"
    model: Any = tiny_model(model_type, "lm" if model_type == "llama" else "classification").base_model
    model.config.architectures = [type(model).__name__]
    model.save_pretrained(path)
    tiny_tokenizer(path)
    for name, content in SENTENCES.items():
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text(json.dumps(content))
    text = place / "text.txt"
    text.write_text(tiny_text(3000))
    return path, ["--calibration", str(text), "--samples", "24", "--seq-len", "24"]


def states(path: Path) -> torch.Tensor:
    with torch.no_grad():
        return AutoModel.from_pretrained(path).eval()(input_ids=IDS).last_hidden_state


def has_all(path: Path) -> bool:
    return all(json.loads((path / name).read_text()) == content for name, content in SENTENCES.items())


@pytest.mark.parametrize("model_type", ["bert", "distilbert", "llama"])
def test_without_a_head_with_what_sentence_transformers_needs(model_type: str, tmp_path: Path) -> None:
    model, data = saved(tmp_path, model_type)
    run = tmp_path / "run"
    done("compress", model, "--method", "svd-llm", "--ratio", "0.2", *data, "--out", run)
    assert has_all(run / "model")
    done("verify", run)
    assert type(api.load(run)).__name__ == type(AutoModel.from_pretrained(model)).__name__
    near = states(run / "model")
    assert (near - states(model)).abs().max() > 1e-3
    done("export", run, "--dense", tmp_path / "exported")
    assert has_all(tmp_path / "exported")
    torch.testing.assert_close(states(tmp_path / "exported"), near, rtol=1e-4, atol=1e-4)


def test_quantized_and_native_checkpoints_keep_it_too(tmp_path: Path) -> None:
    model, data = saved(tmp_path)
    run, table = tmp_path / "run", pairs(tmp_path / "pairs.csv")
    narrow = ("--method", "nystrom", "--attention", "dense", "--allocate", "equal-widths", "--ratio", "0.2")
    done("compress", model, *narrow, *data, "--out", run)
    done("export", run, "--native", tmp_path / "native")
    assert has_all(tmp_path / "native")
    torch.testing.assert_close(states(tmp_path / "native"), states(run / "model"), rtol=1e-5, atol=1e-5)
    done("quantize", run, "--bits", "8", *data[:2])
    done("quantize", model, "--bits", "8", *data, "--out", tmp_path / "quantized")
    assert has_all(run / "quantize")
    assert has_all(tmp_path / "quantized")
    found = done("compare", run / "model", run / "quantize", "--sts", table, "--json").json["sts"][str(table)]
    assert 0.999 < found["lowest_cosine"] < 1
    torch.testing.assert_close(states(tmp_path / "quantized"), states(model), rtol=0.1, atol=0.1)
    assert "½‖Δe‖² a text" in done("show", run).out


def test_gradients_of_layers_are_means_over_texts(tmp_path: Path) -> None:
    path, _ = saved(tmp_path)
    name = "encoder.layer.1.output.dense"
    model, seen = AutoModel.from_pretrained(path, dtype=torch.float64).eval(), []
    model.get_submodule(name).register_forward_hook(lambda _, args, out: (out.retain_grad(), seen.append(out))[0])
    hidden = model(input_ids=IDS).last_hidden_state
    embedded = torch.nn.functional.normalize(hidden.mean(1), dim=-1)
    signs = [torch.randint(2, (32,), generator=torch.Generator().manual_seed(n)).double() * 2 - 1 for n in (0, 1)]
    (embedded * torch.stack(signs)).sum().backward()
    skeleton = Skeleton(Checkpoint(path), torch.device("cpu"), torch.float64)
    batch = Batch(IDS, outputs=1)
    found = dict(layer_moments(skeleton, [batch], [[], [name]], gradients=True, skip=lambda block: block == 0))
    rows = seen[0].grad.flatten(0, 1)
    torch.testing.assert_close(found[1][name].fisher, rows.mT @ rows / 2)


def test_replacing_a_run_leaves_nothing_over_and_loses_nothing(tmp_path: Path) -> None:
    model, _ = saved(tmp_path)
    run = tmp_path / "run"
    done("compress", model, "--method", "svd", "--ratio", "0.2", "--out", run)
    (run / "model" / "1_Pooling" / "mine.txt").write_text("mine")
    done("compress", model, "--method", "svd", "--ratio", "0.3", "--out", run, "--overwrite")
    assert [path.read_text() for path in run.rglob("mine*")] == ["mine"]
    assert has_all(run / "model")
    done("cast", run, "--dtype", "bfloat16")
    done("cast", run, "--dtype", "float16", "--overwrite")
    assert has_all(run / "cast")
    assert len(list((run / "cast").rglob("1_Pooling*"))) == 1


@pytest.mark.slow
@pytest.mark.parametrize(("method", "model_type"), [("kfac", "bert"), ("fwsvd", "distilbert"), ("auto", "bert")])
def test_gradients_are_of_the_embedding(method: str, model_type: str, tmp_path: Path) -> None:
    model, data = saved(tmp_path, model_type)
    run = tmp_path / "run"
    done("compress", model, "--method", method, "--ratio", "0.3", *data, "--out", run)
    assert has_all(run / "model")
    table = pairs(tmp_path / "pairs.csv")
    found = done("eval", run, "--sts", table, "--json").json["sts"][str(table)]
    assert 0.5 < found["cosine"] < 1 - 1e-6
    shown = done("eval", run, "--sts", table)
    assert "8 pairs, cosine to dense" in " ".join(shown.out.split())
    if method == "auto":
        assert "nearer to dense" in " ".join(done("show", run).out.split()) or (run / "unrefined").exists()


def test_what_is_behind_the_model_and_not_known_is_refused_by_name(tmp_path: Path) -> None:
    model, data = saved(tmp_path)
    kfac = ["compress", model, "--method", "kfac", *data, "--out", tmp_path / "run"]
    dense = [*SENTENCES["modules.json"], {"path": "2_Dense", "type": "sentence_transformers.models.Dense"}]
    (model / "modules.json").write_text(json.dumps(dense))
    assert "has a Dense module behind the model" in refused(*kfac)
    assert not (tmp_path / "run").exists()
    (model / "modules.json").write_text(json.dumps(MODULES))
    (model / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_weightedmean_tokens": True}))
    said = refused(*kfac)
    assert "says pooling_mode_weightedmean_tokens; known are mean, cls, max" in said
    assert "--method svd-llm" in said
    (model / "modules.json").write_text("{}")
    assert "holds no list of modules" in refused(*kfac)
    done("compress", model, "--method", "svd-llm", "--ratio", "0.2", *data, "--out", tmp_path / "run")


def pairs(path: Path, header: str = "sentence1,sentence2,score") -> Path:
    """Write pairs of texts of several lengths, some of which come again."""
    texts = [tiny_text(12 + 9 * (i % 5), i).replace(",", "").replace("\n", " ").strip() for i in range(12)]
    rows = [f"{texts[i]},{texts[i + 3]},{(7 * i % 8) / 2}" for i in range(8)]
    path.write_text("\n".join([header, *rows, ""]))
    return path


def test_rank_correlation_and_nearness_are_those_of_stock_models(tmp_path: Path) -> None:
    model, data = saved(tmp_path)
    run, table = tmp_path / "run", pairs(tmp_path / "pairs.csv", "a,b,c")
    done("compress", model, "--method", "svd-llm", "--ratio", "0.3", *data, "--out", run)
    columns = ["--text-column", "a", "--text-column", "b", "--label-column", "c"]
    found = done("eval", run, "--sts", table, *columns, "--json").json["sts"][str(table)]
    rows = [line.split(",") for line in table.read_text().splitlines()[1:]]
    tokenizer = AutoTokenizer.from_pretrained(model)
    embedded: dict[str, dict[str, torch.Tensor]] = {}
    for role, path in (("dense", model), ("compressed", run / "model")):
        stock = AutoModel.from_pretrained(path).eval()
        embedded[role] = {}
        for text in {text for row in rows for text in row[:2]}:
            with torch.no_grad():
                hidden = stock(input_ids=torch.tensor([tokenizer(text)["input_ids"]])).last_hidden_state
            embedded[role][text] = torch.nn.functional.normalize(hidden.mean(1)[0].double(), dim=0)
        alike = [float(embedded[role][one] @ embedded[role][other]) for one, other, _ in rows]
        ranks = [torch.tensor(values).argsort().argsort().double() for values in (alike, [float(r[2]) for r in rows])]
        assert found[role] == pytest.approx(float(torch.corrcoef(torch.stack(ranks))[0, 1]), abs=1e-9)
    near = [float(embedded["dense"][text] @ embedded["compressed"][text]) for text in embedded["dense"]]
    assert found["cosine"] == pytest.approx(sum(near) / len(near), abs=1e-6)
    assert found["n"] == 8
    alone = api.evaluate(model, sts=table, text_column="a,b", label_column="c")["sts"][str(table)]
    assert alone["dense"] == pytest.approx(found["dense"])
    assert alone["cosine"] is None


def test_tables_that_are_none_of_pairs(tmp_path: Path, tiny: Tiny) -> None:
    model, _ = saved(tmp_path)
    table = pairs(tmp_path / "pairs.csv", "a,b,c")
    assert "without the columns sentence1, sentence2 and score" in refused("eval", model, "--sts", table)
    one = ["--text-column", "a", "--label-column", "c"]
    assert "--text-column names 1. Give it twice" in refused("eval", model, "--sts", table, *one)
    words = ["--text-column", "a", "--text-column", "b", "--label-column", "a"]
    assert "expected a number" in refused("eval", model, "--sts", table, *words).lower()
    (tmp_path / "same.csv").write_text("sentence1,sentence2,score\na,b,1\nb,a,1\n")
    assert "2 pairs, and no two different scores" in refused("eval", model, "--sts", tmp_path / "same.csv")
    assert "a LlamaForCausalLM has a head" in refused("eval", tiny.model, "--sts", pairs(tmp_path / "p.csv"))


def test_two_embedding_models_are_compared(tmp_path: Path, tiny: Tiny) -> None:
    model, data = saved(tmp_path)
    runs, table = [tmp_path / "some", tmp_path / "more"], pairs(tmp_path / "pairs.csv")
    for run, ratio in zip(runs, ("0.2", "0.5"), strict=True):
        done("compress", model, "--method", "svd-llm", "--ratio", ratio, *data, "--out", run)
    found = done("compare", model, runs[1], "--sts", table, "--json").json["sts"][str(table)]
    measured = done("eval", runs[1], "--sts", table, "--json").json["sts"][str(table)]
    assert found["correlation"] == pytest.approx({"a": measured["dense"], "b": measured["compressed"]})
    assert found["cosine"]["value"] == pytest.approx(measured["cosine"], abs=1e-6)
    assert found["cosine"]["low"] < found["cosine"]["value"] < found["cosine"]["high"]
    assert found["lowest_cosine"] < found["cosine"]["value"]
    assert found["difference"]["value"] == pytest.approx(measured["compressed"] - measured["dense"])
    assert found["blocks"][-1]["cosine"] < 1
    some = lowrank_compress.compare(model, runs[0], sts=table)["sts"][str(table)]
    assert some["cosine"]["value"] > found["cosine"]["value"]
    said = " ".join(done("compare", *runs, "--sts", table).out.split())
    assert "pairs.csv (8 pairs, " in said
    assert "cosine of B's embedding to A's" in said
    assert "Hidden states that leave each block" in said
    assert "of a BertModel use --sts" in refused("compare", *runs, "--perplexity", table)
    assert "a LlamaForCausalLM has a head" in refused("compare", tiny.model, tiny.model, "--sts", table)


def test_recover_trains_towards_the_dense_embeddings(tmp_path: Path) -> None:
    model, data = saved(tmp_path)
    run, table = tmp_path / "run", pairs(tmp_path / "pairs.csv")
    done("compress", model, "--method", "svd-llm", "--ratio", "0.4", *data, "--out", run)
    before = done("eval", run, "--sts", table, "--json").json["sts"][str(table)]["cosine"]
    done("recover", run, "--steps", "40", "--seq-len", "24", "--lr", "3e-3")
    after = done("eval", run, "--sts", table, "--json").json["sts"][str(table)]["cosine"]
    assert 1 - after < 0.75 * (1 - before)
    assert has_all(run / "recover")
    said = refused("recover", run, "--text", tmp_path / "text.txt", "--steps", "1", "--out", tmp_path / "other")
    assert "no head that could be trained on a text of one's own" in said


def test_plans_are_tried_on_other_passages(tmp_path: Path) -> None:
    model, _ = saved(tmp_path)
    lines = [f"{tiny_text(20 + i, i)}".replace("\n", " ") for i in range(120)]
    (tmp_path / "text.txt").write_text("\n\n".join(lines))
    config = CalibrationSet(source=str(tmp_path / "text.txt"), samples=30, seq_len=24, micro_batch=4)
    seen, tried = (
        [tuple(row) for batch in batches for row in batch.ids.tolist()]
        for batches in (
            calibration_batches(config, Checkpoint(model), "embedding"),
            held_out_batches(config, Checkpoint(model), "embedding"),
        )
    )
    assert (len(seen), len(tried)) == (30, 64)
    assert not set(seen) & set(tried)


def test_pickled_modules_are_refused(tmp_path: Path) -> None:
    model, _ = saved(tmp_path)
    (model / "2_Dense").mkdir()
    (model / "2_Dense" / "pytorch_model.bin").write_bytes(b"")
    said = refused("compress", model, "--method", "svd", "--out", tmp_path / "run")
    assert "2_Dense/pytorch_model.bin is a pickle" in said


@pytest.mark.slow
def test_one_budget_of_bytes(tmp_path: Path) -> None:
    """Ranks and bits are chosen by what they do to the embedding."""
    model, data = saved(tmp_path)
    run = tmp_path / "run"
    said = done("compress", model, "--bytes", "0.3", *data, "--out", run, "--json").json
    assert said["stored_bytes"] <= 0.3 * said["claimed_bytes"]
    assert said["quantize"]["unit"] == "½‖Δe‖² a text"
    assert has_all(run / "model")
    done("verify", run)
