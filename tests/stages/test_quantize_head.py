"""`lrc quantize --head`: the output head in few bits, who loads it, what it takes, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lowrank_compress.calibration.layers import layer_moments
from lowrank_compress.evaluation.size import measure_size
from lowrank_compress.linalg.quantease import loss
from lowrank_compress.methods.rounding import ROUNDINGS, Problem
from lowrank_compress.model.checkpoint import Checkpoint
from lowrank_compress.model.skeleton import Skeleton
from lowrank_compress.model.walk.batch import Batch
from lowrank_compress.shipped.packed import PackedLinear
from lowrank_compress.stages import headbits
from lowrank_compress.stages.headbits import rounded_head
from lowrank_compress.stages.layers import Layer
from lowrank_compress.stages.quantizeconfig import QuantizeConfig
from tests.moe import save_moe
from tests.ordinary import tokens
from tests.runs import FEW, Tiny, contents, cut_after_a_block, done, refused
from tests.stages.test_quantize import logits, logits_by_remote_code, quantize, require_saved_and_loaded
from tests.tiny import save_tiny

HEAD = 96 * 32
"""Weights of the tiny models' heads."""


def made(target: Path, tiny: Tiny, *options: object) -> dict[str, Any]:
    return quantize(target, *options, "--calibration", tiny.text, *FEW)["quantize"]


def packed_bytes(out: Path, path: str = "lm_head") -> int:
    tensors = load_file(out / "model.safetensors")
    assert f"{path}.weight" not in tensors
    return sum(tensor.nbytes for name, tensor in tensors.items() if name.startswith(f"{path}.weight_"))


@pytest.mark.parametrize("bits", [4, 6])  # as all the rest, and otherwise
def test_stock_transformers_load_it(tiny: Tiny, tmp_path: Path, bits: int) -> None:
    out, dense = tmp_path / "out", tmp_path / "dense"
    said = made(tiny.model, tiny, "--head", bits, "--out", out)
    assert said["format"] == json.loads((out / "config.json").read_text())["quantization_config"]["quant_method"]
    assert said["head"] == {"bits": bits, "bytes": packed_bytes(out)}
    size, before = measure_size(Checkpoint(out)), measure_size(Checkpoint(tiny.model))
    assert said["stored_bytes"] == size.block_bytes + packed_bytes(out)
    assert said["original_bytes"] == before.block_bytes + 4 * HEAD
    assert said["layer_bytes"] == size.block_bytes
    assert size.model == before.model
    assert size.bytes == sum(tensor.nbytes for tensor in load_file(out / "model.safetensors").values())
    done("export", out, "--dense", dense)
    expected = AutoModelForCausalLM.from_pretrained(dense)
    assert set(load_file(dense / "model.safetensors")) == set(load_file(tiny.model / "model.safetensors"))
    head = load_file(dense / "model.safetensors")["lm_head.weight"], expected.lm_head.weight
    stock = AutoModelForCausalLM.from_pretrained(tiny.model).lm_head.weight
    assert torch.equal(*head)
    assert 0 < (head[0] - stock).norm() < 0.12 * stock.norm()
    found = done("eval", out, "--perplexity", tiny.heldout, "--json").json["perplexity"][str(tiny.heldout)]
    other = done("eval", dense, "--perplexity", tiny.heldout, "--json").json["perplexity"][str(tiny.heldout)]
    assert found["compressed"] == pytest.approx(other["dense"], rel=1e-6)
    shown = " ".join(done("show", out).out.split())
    assert f"All weights inside the blocks and those of the head, in {bits} bits, take" in shown
    assert f"│ lm_head │ 96×32 │ {bits} │" in shown
    assert f"those of the head, in {bits} bits, take" in " ".join((out / "README.md").read_text().split())
    assert done("verify", out, "--json").json["ok"]
    pytest.importorskip("compressed_tensors")
    loaded, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(logits(loaded), logits(expected))


@pytest.mark.parametrize("bits", [3, 8])  # before and behind the group of the experts
def test_of_a_mixture_it_is_stock_too(tmp_path: Path, bits: int) -> None:
    source, out = save_moe("mixtral", tmp_path / "mixtral", torch.bfloat16), tmp_path / "out"
    options = ("--rounding", "rtn", "--group", 8, "--bits", 5, "--head", bits, "--out", out)
    assert done("quantize", source, *options, "--json").json["quantize"]["format"] == "compressed-tensors"
    done("export", out, "--dense", tmp_path / "dense")
    pytest.importorskip("compressed_tensors")
    loaded, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(logits(loaded), logits(AutoModelForCausalLM.from_pretrained(tmp_path / "dense")))


@pytest.mark.slow
def test_a_run_has_it_in_its_own_checkpoint(tiny: Tiny, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done("compress", tiny.model, "--method", "svd", "--ratio", 0.2, "--ratio-of", "model", "--out", run)
    before = json.loads((run / "model/lowrank.json").read_text())
    said = quantize(run, "--head", 5, "--asymmetric", "--rounding", "rtn")["quantize"]
    out = run / "quantize"
    report = json.loads((out / "lowrank.json").read_text())
    assert said["format"] == "lowrank"
    assert said["original_bytes"] == before["claimed_bytes"] + 4 * HEAD
    assert report["stored_bytes"] == measure_size(Checkpoint(out)).block_bytes
    # Of the whole model's bytes.
    whole = (measure_size(Checkpoint(out)).bytes, measure_size(Checkpoint(tiny.model)).bytes)
    assert report["reached_ratio_bytes"] == pytest.approx(1 - whole[0] / whole[1], abs=1e-3)
    model = AutoModelForCausalLM.from_pretrained(out)
    assert isinstance(model.lm_head, PackedLinear)
    require_saved_and_loaded(model, tmp_path)
    assert torch.equal(logits_by_remote_code(out, tmp_path), logits(model))
    done("export", run, "--dense", tmp_path / "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert torch.allclose(logits(dense), logits(model), atol=1e-4)
    assert torch.allclose(logits(model.dequantize()), logits(dense), atol=1e-5)
    assert done("verify", run, "--json").json["ok"]


def test_the_budget_of_bytes_counts_it(tiny: Tiny, tmp_path: Path) -> None:
    for bits in (8, 2):
        out = tmp_path / f"{bits}"
        said = quantize(tiny.model, "--bytes", 0.15, "--head", bits, "--rounding", "rtn", "--out", out)["quantize"]
        reached = measure_size(Checkpoint(out)).block_bytes + packed_bytes(out)
        assert reached == said["stored_bytes"] <= 0.15 * said["original_bytes"]
        assert reached > 0.14 * said["original_bytes"]
    few, many = (
        json.loads((tmp_path / name / "lowrank.json").read_text())["quantize"]["layer_bytes"] for name in ("8", "2")
    )
    assert few < many
    message = refused(
        "quantize", tiny.model, "--bytes", 0.05, "--head", 8, "--rounding", "rtn", "--out", tmp_path / "no"
    )
    smallest = message.split("The smallest budget is --bytes ")[1].split(";")[0]
    options = ("--head", 8, "--rounding", "rtn", "--out", tmp_path / "least")
    done("quantize", tiny.model, "--bytes", smallest, *options)


@pytest.mark.parametrize("gradients", [True, False])
def test_what_enters_it_is_seen_where_a_token_is_scored(tiny: Tiny, gradients: bool) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny.model, dtype=torch.float64)
    ids, seen = torch.stack(tokens(12, 12, 12)), list[torch.Tensor]()
    model.lm_head.register_forward_hook(lambda module, args, out: seen.append(args[0].detach()))
    model(ids)
    x = seen[0][:, :-1].flatten(0, 1)
    skeleton = Skeleton(Checkpoint(tiny.model), torch.device("cpu"), torch.float64)
    names = [[f"model.layers.{block}.self_attn.q_proj"] for block in (0, 1)]
    batches = [Batch(ids[:2]), Batch(ids[2:])]
    for skipped in ((), (0, 1), (2,)):
        found = dict(
            layer_moments(
                skeleton, batches, names, gradients=gradients, head="lm_head", skip=lambda n, done=skipped: n in done
            )
        )
        assert set(found) == {0, 1, 2} - set(skipped)
        if 2 in found:
            assert found[2]["lm_head"].tokens == 33
            assert torch.allclose(found[2]["lm_head"].gram, x.T @ x / 33, atol=1e-12)


def test_a_few_rows_at_a_time_are_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(rows, 16, generator=generator).double() for rows in (23, 40))
    config = QuantizeConfig(source=None, seq_len=8, micro_batch=1, bits=4, rounding="gptq")
    layer = Layer("lm_head", 2, (23, 16), False)
    grid = headbits.Grid(3, 8, True)
    monkeypatch.setattr(headbits, "ROWS", 5)
    known = headbits.LayerMoments(x.T @ x, None, 40)
    kept, share = rounded_head(config, layer, grid, weight, known, torch.bfloat16)
    problem = Problem(weight, torch.bfloat16, config.damping, config.damping_fisher, x.T @ x)
    whole = ROUNDINGS["gptq"].fit(problem, grid)
    assert torch.equal(kept["codes"].double(), whole.codes)
    assert torch.equal(kept["scale"].double(), whole.scales.scale)
    assert share == pytest.approx(problem.lost(whole))
    plain = ROUNDINGS["rtn"].fit(problem, grid)
    assert loss(weight - whole.matrix(), x.T @ x) < loss(weight - plain.matrix(), x.T @ x)


def test_killed_behind_the_head_it_ends_in_the_same_bytes(tiny: Tiny, tmp_path: Path) -> None:
    options = (tiny.model, tiny, "--head", 4, "--out")
    made(*options, tmp_path / "whole")
    assert cut_after_a_block(lambda: made(*options, tmp_path / "cut"))
    (kept,) = (tmp_path / "cut.work").iterdir()
    assert kept.name.endswith("-0002.safetensors")
    made(*options, tmp_path / "cut")
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_what_cannot_be_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    def message(target: Path, *options: object) -> str:
        return refused("quantize", target, "--rounding", "rtn", *options, "--out", tmp_path / "no")

    assert "head is 7; expected one of 2, 3, 4, 5, 6, 8, the bits of the head" in message(tiny.model, "--head", 7)
    tied = save_tiny("llama", tmp_path / "tied", tie_word_embeddings=True)
    found = message(tied, "--head", 8)
    assert "has no weight of its own: it is the table of its tokens (tie_word_embeddings)" in found
    assert "Leave out --head" in found
    classifier = save_tiny("bert", tmp_path / "bert", "classification")
    assert "--head is for language models" in message(classifier, "--head", 8)
    run = tmp_path / "run"
    options = ("--method", "dense", "--for", "head=svd", "--ratio", 0.05, "--ratio-of", "model", "--out", run)
    done("compress", tiny.model, *options)
    assert "is of low rank already; --head takes one that is stored whole" in message(run, "--head", 8)


def test_a_head_of_low_rank_counts_among_what_is_stored(tiny: Tiny, tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    done("compress", tiny.model, "--method", "dense", "--for", "head=svd", "--ratio", 0.05, "--ratio-of", "model",
         "--out", run)  # fmt: skip
    done("quantize", run, "--rounding", "rtn", "--bytes", 0.45, "--out", out)
    stored = load_file(out / "model.safetensors")
    claimed = [tensor for name, tensor in stored.items() if "norm" not in name and "embed" not in name]
    report = json.loads((out / "lowrank.json").read_text())
    size = sum(tensor.nbytes for tensor in claimed)
    assert report["quantize"]["stored_bytes"] == report["stored_bytes"] == size
    assert 0.4 * report["claimed_bytes"] < size <= 0.45 * report["claimed_bytes"]


def test_without_it_nothing_is_another_result(tiny: Tiny) -> None:
    from lowrank_compress.stages.quantize import key
    from lowrank_compress.stages.stage import Given

    config = QuantizeConfig(source=None, seq_len=8, micro_batch=1, bits=4, rounding="rtn")
    given = Given(Checkpoint(tiny.model), {})
    assert "head" not in key(config, given).config
    assert key(config.model_copy(update={"head": 8}), given).config["head"] == 8
