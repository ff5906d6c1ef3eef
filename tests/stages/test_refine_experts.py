"""What routed experts are fitted to: against both whole models, an expert and a token at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from lowrank_compress.linalg.refine import Sample
from lowrank_compress.model.checkpoint import Checkpoint
from lowrank_compress.model.skeleton import Skeleton
from lowrank_compress.model.walk.batch import Batch
from lowrank_compress.model.walk.walk import Walk
from lowrank_compress.stages.refining import BlockRefiner
from lowrank_compress.stages.refiningexperts import expert_sums
from tests.moe import plain_expert, plain_hidden, save_moe
from tests.ordinary import tokens
from tests.runs import done
from tests.tiny import tiny_text

NORM = "post_attention_layernorm"
Call = tuple[Tensor, Tensor, Tensor, Tensor]


def calls_of(path: Path, sequences: list[Tensor]) -> tuple[Any, list[Call]]:
    """Return the experts of the last block, and what they are called with in each sequence (and the stream)."""
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64, experts_implementation="eager").eval()
    block, found, streams = model.model.layers[1], list[Call](), list[Tensor]()
    hooks = [
        block.get_submodule(NORM).register_forward_pre_hook(lambda _, args: streams.append(args[0][0])),
        block.mlp.experts.register_forward_pre_hook(lambda _, args: found.append((*args, streams[-1]))),
    ]
    with torch.no_grad():
        for ids in sequences:
            model(ids[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    return block.mlp.experts, found


@torch.no_grad()
def slow_sums(dense: Any, compressed: Any, calls: list[list[Call]], expert: int, half: int, down: bool) -> list[Tensor]:
    """Add up, for one half of the sequences, a token at a time: moments of the inputs, and with the targets."""
    inputs, targets = [], []
    for there, here in list(zip(*calls, strict=True))[half::2]:
        x, index, weights, stream = there
        own, chosen, shares, moved = here
        lost = stream - moved + dense(x, index, weights) - dense(x, chosen, shares)
        for token in range(len(x)):
            if expert not in chosen[token]:
                continue
            if down:
                one = compressed[expert]
                inputs.append(plain_hidden(dense, one.lr_gating(own[token]), one.lr_up(own[token])))
                parts = plain_expert(dense, expert)
                gate, up = (torch.nn.functional.linear(x[token], *parts[role]) for role in ("gate", "up"))
                made = parts["down"][0] @ plain_hidden(dense, gate, up)  # beside the bias
                targets.append(made + lost[token] / shares[token].sum())
            else:
                inputs.append(own[token])
                targets.append(x[token])
    one, other = torch.stack(inputs), torch.stack(targets)
    return [one.T @ one, other.T @ one, torch.tensor(len(one))]


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"])
def test_sums_of_experts(model_type: str, tmp_path: Path) -> None:
    model, text = save_moe(model_type, tmp_path / "dense"), tmp_path / "text.txt"
    text.write_text(tiny_text(600))
    done("compress", model, "--method", "svd", "--ratio", "0.4", "--out", tmp_path / "run")
    sequences = tokens(*[11] * 5)
    skeletons = [
        Skeleton(Checkpoint(path), torch.device("cpu"), torch.float64) for path in (model, tmp_path / "run/model")
    ]
    batches = [Batch(torch.stack(sequences[:2])), Batch(torch.stack(sequences[2:]), first=2)]
    dense, there = calls_of(model, sequences)
    compressed, here = calls_of(tmp_path / "run/model", sequences)
    assert any(not torch.equal(one[1], other[1]) for one, other in zip(there, here, strict=True))
    for step in Walk(skeletons, batches).forwards():
        for down in (False, True) if step.index == 1 else ():
            found = expert_sums(step, batches, "mlp.experts", NORM, range(4), down=down)
            for expert, halves in found.items():
                for half in range(2):
                    expected = slow_sums(dense, compressed, [there, here], expert, half, down)
                    assert_sums(halves[half], expected, (expert, half, down))
            assert len(found) == 4


def assert_sums(found: Sample, expected: list[Tensor], what: object) -> None:
    for one, other in zip((found.gram, found.cross), expected, strict=False):
        assert float((one - other).abs().max()) <= 1e-10 * float(other.abs().max()), what
    assert found.count == int(expected[2]), what


def test_experts_are_fitted_in_every_format(tmp_path: Path) -> None:
    """Factors, narrower ones and what has lost everything; an MLP beside them comes last."""
    model, text = save_moe("qwen2_moe", tmp_path / "dense"), tmp_path / "text.txt"
    text.write_text(tiny_text(3000))
    run = tmp_path / "run"
    options = ("--calibration", text, "--samples", "16", "--seq-len", "32", "--ratio", "0.6")
    parts = ("--mlp", "kfac|nystrom", "--method", "kfac", "--allocate", "loss", "--storage", "auto")
    done("compress", model, *options, *parts, "--out", run)
    done("refine", run, "--samples", "16")
    refine = done("show", run, "--json").json["refine"]
    assert refine["taken"] == (refine["divergence_after"] < refine["divergence_before"])
    fitted = {name for name, value in refine["lambdas"].items() if value != "keep"}
    assert any(".experts." in name for name in fitted)
    dense, compressed = (
        Skeleton(Checkpoint(path), torch.device("cpu"), torch.float32) for path in (model, run / "model")
    )
    refiner = BlockRefiner(dense, compressed, [], [1.0], 1e-4)
    assert {each.target.role for each in refiner.maps.values() if each.target.expert is not None} == {
        "gate",
        "up",
        "down",
    }
