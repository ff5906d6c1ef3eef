"""`lrc quantize` of mixtures with something beside the codes: against a plain loop over tensors as they are stored."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from lowrank_compress.evaluation.size import measure_size
from lowrank_compress.model.checkpoint import Checkpoint
from lowrank_compress.stages.quantizeconfig import QuantizeConfig
from lowrank_compress.stages.samples import calibration_batches
from tests.moe import LEAVES, Watched, plain_hidden, save_choosy, save_moe
from tests.runs import Tiny, done
from tests.stages.test_quantize_experts import experts_in, made

FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "qwen2_moe": {"mlp_only_layers": []},
    "gpt_oss": {"layer_types": ["sliding_attention"]},
}
"""Of one block, with routed experts."""
LOUD = 1.5
AIDS: dict[str, tuple[object, ...]] = {
    "svdquant": ("--bits", 4, "--smooth", "--residual-rank", 3, "--activation-bits", 6, "--rounding", "rtn"),
    "lq-lora": ("--bits", 3, "--residual-rank", 2, "--residual-inside", "--rounding", "gptq"),
    "int8": ("--bits", 8, "--group", 0, "--outliers", LOUD, "--activation-bits", 8, "--rounding", "rtn"),
}
BITS = {"svdquant": (4, 6), "lq-lora": (3, 0), "int8": (8, 8)}
"""Of codes, and of activations."""


def decoded(words: Tensor, bits: int, columns: int) -> Tensor:
    """Read codes (m, columns) from rows of 32-bit words, the row as one large number."""
    rows = []
    for row in words.tolist():
        whole = sum((word & 0xFFFFFFFF) << (32 * place) for place, word in enumerate(row))
        rows.append([(whole >> (place * bits)) % (1 << bits) - (1 << (bits - 1)) for place in range(columns)])
    return torch.tensor(rows, dtype=torch.float64)


class Slow(nn.Module):
    """A layer by its stored tensors, of leaf names as they are on the disk; float64, one token and group at a time."""

    def __init__(self, stored: Mapping[str, Tensor], bits: tuple[int, int], bias: Tensor | None) -> None:
        super().__init__()
        self.bias, self.activation_bits = bias, bits[1]
        rows, columns = stored["shape"].tolist()
        self.group = columns // stored["scale"].shape[1]
        scales = stored["scale"].double().repeat_interleave(self.group, 1)
        self.codes = decoded(stored["packed"], bits[0], columns) * scales
        self.smooth = stored.get("smooth", torch.ones(columns)).double()
        self.outer, self.inner = (
            stored.get(name, torch.zeros(shape)).double()
            for name, shape in (("outer", (rows, 0)), ("inner", (0, columns)))
        )
        self.columns: list[int] = stored.get("columns", torch.zeros(0)).long().tolist()
        self.kept = stored.get("outliers", torch.zeros(rows, 0)).double()

    def forward(self, x: Tensor) -> Tensor:
        met = x / self.smooth
        met[..., self.columns] = 0
        if self.activation_bits:
            for token in met.view(-1, met.shape[-1]):
                for part in token.split(self.group):
                    step = part.abs().max() / (2 ** (self.activation_bits - 1) - 1)
                    part.copy_((part / step).round() * step if step else part)
        y = met @ self.codes.T + x @ self.inner.T @ self.outer.T + x[..., self.columns] @ self.kept.T
        return y if self.bias is None else y + self.bias


def slow_model(source: Path, out: Path, bits: tuple[int, int]) -> PreTrainedModel:
    """Return the stock model of the original, every layer that is packed in `out` replaced by a slow one."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float64).eval()
    stored = load_file(out / "model.safetensors")
    layers: dict[str, Slow] = {}
    for name in stored:
        path, _, leaf = name.rpartition(".")
        if leaf == "weight_packed":
            start = f"{path}.weight_"
            own = {key.removeprefix(start): tensor for key, tensor in stored.items() if key.startswith(start)}
            bias = stored.get(f"{path}.bias")
            layers[path] = Slow(own, bits, None if bias is None else bias.double())
    for path, layer in layers.items():
        if ".experts." not in path:
            model.set_submodule(path, layer)
    for path, experts in list(model.named_modules()):
        if path.endswith(".experts"):
            experts.forward = looped(path, experts, layers)
    return model


def looped(path: str, experts: Any, layers: Mapping[str, Slow]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Make the forward of a block's experts: token by token, and of each token expert by expert."""

    def forward(x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        rows = []
        for token, chosen, shares in zip(x, index.tolist(), weights, strict=True):
            total = torch.zeros_like(token)
            for number, share in zip(chosen, shares, strict=True):
                gate, up, down = (layers[f"{path}.{number}.{LEAVES[role]}"] for role in ("gate", "up", "down"))
                total = total + share * down(plain_hidden(experts, gate(token), up(token)))
            rows.append(total)
        return torch.stack(rows)

    return forward


def mixture(family: str, place: Path) -> Path:
    return save_moe(family, place, **FAMILIES[family], num_hidden_layers=1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "aid"), [("mixtral", "svdquant"), ("qwen2_moe", "lq-lora"), *(("gpt_oss", aid) for aid in AIDS)]
)
def test_it_computes_what_its_stored_tensors_say(tiny: Tiny, tmp_path: Path, family: str, aid: str) -> None:
    source, out = mixture(family, tmp_path / family), tmp_path / "out"
    said = made(source, out, tiny, *AIDS[aid])
    size, before = measure_size(Checkpoint(out)), measure_size(Checkpoint(source))
    assert said["format"] == "lowrank"
    assert size.block_bytes == said["stored_bytes"] == said["layer_bytes"] + before.block_bytes - 4 * said["weights"]
    text = tmp_path / "short.txt"
    text.write_text(tiny.heldout.read_text()[:220])
    found = done("eval", out, "--perplexity", text, "--seq-len", 32, "--json").json["perplexity"][str(text)]
    tokenizer = AutoTokenizer.from_pretrained(source)
    ids = tokenizer(text.read_text(), add_special_tokens=False)["input_ids"]
    slow, plain = slow_model(source, out, BITS[aid]), AutoModelForCausalLM.from_pretrained(source)
    packed, exact = (AutoModelForCausalLM.from_pretrained(out, dtype=dtype) for dtype in (torch.float32, torch.float64))
    lost = dict.fromkeys(("slow", "packed", "plain"), 0.0)
    for first in range(0, len(ids), 31):
        window = torch.tensor([[tokenizer.bos_token_id, *ids[first : first + 31]]])
        with torch.no_grad():
            logits = {"slow": slow(window).logits, "packed": packed(window).logits, "plain": plain(window).logits}
            assert torch.allclose(exact(window).logits, logits["slow"], atol=1e-9)
        assert (logits["slow"] - logits["plain"]).norm() > 2e-3 * logits["plain"].norm()
        for name, each in logits.items():
            lost[name] -= float(each[0, :-1].double().log_softmax(-1).gather(1, window[0, 1:, None]).sum())
    value = {name: math.exp(each / len(ids)) for name, each in lost.items()}
    assert found["tokens"] == len(ids)
    assert found["compressed"] == pytest.approx(value["packed"], rel=1e-6)
    assert value["packed"] == pytest.approx(value["slow"], rel=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_expert_keeps_the_columns_that_its_own_tokens_are_loud_in(tiny: Tiny, tmp_path: Path, family: str) -> None:
    source, out = mixture(family, tmp_path / family), tmp_path / "out"
    made(source, out, tiny, *AIDS["int8"])
    config = QuantizeConfig(source=str(tiny.text), samples=8, seq_len=32, micro_batch=8, bits=8.0)
    windows = [row for batch in calibration_batches(config, Checkpoint(source), "lm") for row in batch.ids]
    traces = Watched(AutoModelForCausalLM.from_pretrained(source)).traces(windows)
    stored, kept = load_file(out / "model.safetensors"), set()
    for path, seen in traces.items():
        peaks = torch.cat([part[0] for part in seen]).abs().amax(0)
        expected = (peaks > LOUD).nonzero().flatten()
        found = stored.get(f"{path}.weight_columns", torch.zeros(0))
        assert found.tolist() == expected.tolist()
        kept.add(tuple(found.tolist()))
    assert len(kept) > 3


def test_experts_that_saw_nothing_have_nothing_beside_their_codes(tiny: Tiny, tmp_path: Path) -> None:
    """Nothing shifted, no column kept; a product for what the codes lack, as of the others."""
    out = tmp_path / "out"
    made(save_choosy(tmp_path / "choosy"), out, tiny, *AIDS["svdquant"], "--outliers", LOUD)
    assert experts_in(out)["thin"] == {f"model.layers.1.mlp.experts.{number}": 0 for number in (0, 3, 4, 5, 6, 7)}
    stored = load_file(out / "model.safetensors")
    for number in range(8):
        shifted = [stored[f"model.layers.1.mlp.experts.{number}.{leaf}.weight_smooth"] for leaf in LEAVES.values()]
        kept = [f"model.layers.1.mlp.experts.{number}.{leaf}.weight_columns" in stored for leaf in LEAVES.values()]
        assert any(bool((each != 1).any()) for each in shifted) is (number in (1, 2))
        assert any(kept) is (number in (1, 2))
    model = AutoModelForCausalLM.from_pretrained(out)
    with torch.no_grad():
        assert bool(torch.isfinite(model(torch.arange(4, 36)[None]).logits).all())
