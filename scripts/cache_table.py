"""Perplexity by what the key-value cache keeps: factored apart or jointly, with and without exact positions.

    python scripts/cache_table.py MODEL CALIBRATION TEXT [--kept 0.5,0.3,0.2] [--windows 0,32] [--bits 4]
        [--only "ranks by loss"] [--write README.md NAME]

Each row is another way to find the factors at the same number of cached elements a token, each column a share of the
cache that is kept (exact positions not counted). The model itself stays dense. Factored apart, keys and values have a
latent of their own each, in the Gram metric, as CSKV (2024) initialises them.

With --bits there are rows whose latents are rounded besides, each number of them to the nearest of so many bits between
the least and the largest of it in --group tokens, as KIVI (2024) rounds keys; beside them stands what is kept with the
two times 16 bits of each group. With --backend quanto transformers' own quantized cache rounds them, which needs
optimum-quanto: its groups are --group numbers of a token, and perplexity is measured through that cache, with 64 tokens
at a time or --group, whichever is more.
"""

from __future__ import annotations

import argparse
import inspect
import itertools
import math
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from running import write_between
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, QuantizedCache

from lowrank_compress.allocation.curve import make_curve
from lowrank_compress.allocation.loss import allocate
from lowrank_compress.artifacts.manifest import read_manifest
from lowrank_compress.artifacts.tensors import BlockFiles
from lowrank_compress.calibration.sources import Source
from lowrank_compress.calibration.statistics import statistic_key
from lowrank_compress.calibration.tokens import load_tokenizer
from lowrank_compress.config import EvaluateConfig
from lowrank_compress.linalg.weighted import factors
from lowrank_compress.methods.joint import joint
from lowrank_compress.methods.latent import LatentGroup
from lowrank_compress.methods.linear import Damping
from lowrank_compress.model.surgery import attention_entry
from lowrank_compress.recipe import Recipe
from lowrank_compress.shipped.config import LowRankConfig
from lowrank_compress.shipped.swap import swap_modules
from lowrank_compress.stages import pipeline
from lowrank_compress.stages.plan import Plan, make_plan
from lowrank_compress.stages.reading import text_batches
from lowrank_compress.stages.run import Run
from lowrank_compress.stages.table import STAGES

Found = list[tuple[Tensor, Tensor]]
"""A (2 · kv, r) and B (r, hidden) of every block."""


class Moments:
    """W, G, F_k and F_v of every block, float64."""

    def __init__(self, plan: Plan, run: Run) -> None:
        manifest = read_manifest(run.statistics)
        assert manifest is not None
        files = BlockFiles(run.statistics, manifest.id)
        self.groups: list[LatentGroup] = [group for group in plan.chooser.cache if isinstance(group, LatentGroup)]
        self.weights, self.grams, self.fishers = list[Tensor](), list[Tensor](), list[list[Tensor]]()
        for group in self.groups:
            means = files.read(group.block)
            self.weights.append(torch.cat([plan.subject.model.weight(t).double() for t in group.targets]))
            self.grams.append(means[statistic_key(group.targets[0], "in_gram")].double())
            self.fishers.append([means[statistic_key(t, "out_fisher")].double() for t in group.targets])


def apart(moments: Moments, kept: float) -> Found:
    """Keys and values by themselves in the Gram metric, half of the latent each."""
    found = []
    for weight, gram in zip(moments.weights, moments.grams, strict=True):
        half = len(weight) // 2
        ranks = [int(kept * len(weight)) // 2, (int(kept * len(weight)) + 1) // 2]
        plain = torch.eye(half, dtype=torch.float64)
        pairs = [
            factors(part, joint(part, gram, plain, Damping(), None), min(rank, *part.shape))
            for part, rank in zip(weight.chunk(2), ranks, strict=True)
        ]
        found.append((torch.block_diag(*(left for left, _ in pairs)), torch.cat([right for _, right in pairs])))
    return found


def together(moments: Moments, kept: float, *, fisher: bool, by_loss: bool) -> Found:
    """Jointly, in the Gram or the K-FAC metric; the same rank everywhere, or ranks by predicted loss."""
    projectors = [
        joint(weight, gram, torch.block_diag(*both) if fisher else torch.eye(len(weight)).double(), Damping())
        for weight, gram, both in zip(moments.weights, moments.grams, moments.fishers, strict=True)
    ]
    ranks = [min(int(kept * len(weight)), weight.shape[1]) for weight in moments.weights]
    if by_loss:
        choices = [group.choices("latent") for group in moments.groups]
        curves = [
            make_curve(group.name, group.cached, each, projector.tail().numpy()[each.parameters[:, 0]] / 2)
            for group, each, projector in zip(moments.groups, choices, projectors, strict=True)
        ]
        chosen = allocate(curves, int(kept * sum(group.cached for group in moments.groups)))
        ranks = [
            len(weight) if (choice := curve.choice(point)).is_dense else choice.parameters[0]
            for curve, point, weight in zip(curves, chosen, moments.weights, strict=True)
        ]
    return [
        (torch.eye(len(weight)).double(), weight) if rank == len(weight) else factors(weight, projector, rank)
        for weight, projector, rank in zip(moments.weights, projectors, ranks, strict=True)
    ]


WAYS: Mapping[str, Callable[[Moments, float], Found]] = {
    "apart, Gram metric": apart,
    "jointly, Gram metric": lambda moments, kept: together(moments, kept, fisher=False, by_loss=False),
    "jointly, K-FAC metric": lambda moments, kept: together(moments, kept, fisher=True, by_loss=False),
    "jointly, K-FAC metric, ranks by loss": lambda moments, kept: together(moments, kept, fisher=True, by_loss=True),
}


def rounded(latent: Tensor, bits: int, group: int) -> Tensor:
    """Round latents (sequences, tokens, rank), each number by itself, in groups of tokens."""
    parts = []
    for part in latent.split(group, 1):
        least, most = part.amin(1, keepdim=True), part.amax(1, keepdim=True)
        step = ((most - least) / (2**bits - 1)).clamp(min=torch.finfo(part.dtype).tiny)
        parts.append(((part - least) / step).round() * step + least)
    return torch.cat(parts, 1)


def with_latents(plan: Plan, found: Found, window: int, bits: int | None = None, group: int = 64) -> Any:
    """The dense model, whose attentions rebuild keys and values by these factors, of latents that may be rounded."""
    model: Any = AutoModelForCausalLM.from_pretrained(plan.checkpoint.path, dtype=torch.float32).eval()
    resolved = plan.subject.resolved
    entries, heads, traits = {}, resolved.heads, resolved.architecture.traits
    for block, path in enumerate(resolved.blocks):
        targets = {target.role: target for target in resolved.of_block(block)}
        entry = attention_entry(targets, heads, heads.size, heads.size, rotary=False, traits=traits)
        latent = {"rank": len(found[block][1]), "window": window}
        entries[f"{path}.{resolved.architecture.attention}"] = {**entry, "latent": latent}
    swap_modules(model, LowRankConfig(attention=entries))
    for path, (left, right) in zip(entries, found, strict=True):
        attention = model.get_submodule(path)
        attention.lr_latent.weight = nn.Parameter(right.float())
        attention.lr_rebuild.weight = nn.Parameter(left.float())
        if bits is not None:
            attention.lr_latent.register_forward_hook(lambda _, __, latent: rounded(latent, bits, group))
    return model


@torch.no_grad()
def through_cache(model: Any, batches: list[Any], backend: str, bits: int, group: int) -> float:
    """Return exp of the mean loss of a token, of text that goes through a quantized cache some tokens at a time."""
    nats, tokens, step = 0.0, 0, max(group, 64)
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    for ids in (row[None] for batch in batches for row in batch.ids):
        sizes = {"nbits": bits, "q_group_size": group, "residual_length": step}
        cache = QuantizedCache(backend=backend, config=model.config, **sizes)
        logits = torch.cat([model(part, **{name: cache}).logits for part in ids.split(step, 1)], 1)
        nats += float(nn.functional.cross_entropy(logits[0, :-1].double(), ids[0, 1:], reduction="sum"))
        tokens += ids.shape[1] - 1
    return math.exp(nats / tokens)


@torch.no_grad()
def perplexity(model: Any, batches: list[Any]) -> float:
    """Return exp of the mean loss of a token."""
    nats, tokens = 0.0, 0
    for batch in batches:
        kept = None if batch.mask is None else batch.mask
        logits = model(batch.ids, attention_mask=kept, use_cache=False).logits[:, :-1]
        losses = nn.functional.cross_entropy(logits.flatten(0, 1), batch.ids[:, 1:].flatten(), reduction="none")
        real = torch.ones_like(losses) if kept is None else kept[:, 1:].flatten().float()
        nats, tokens = nats + float((losses * real).double().sum()), tokens + int(real.sum())
    return math.exp(nats / tokens)


def main() -> None:
    """Measure, print, and write where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    for name in ("model", "calibration", "text"):
        parser.add_argument(name)
    parser.add_argument("--kept", default="0.5,0.3,0.2", help="shares of the cache that are kept")
    parser.add_argument("--windows", default="0,32", help="exact positions")
    parser.add_argument("--bits", type=int, help="add rows whose latents are rounded to so many bits")
    parser.add_argument("--backend", help="round by transformers' quantized cache of this name: quanto or hqq")
    parser.add_argument("--group", type=int, default=64, help="tokens that share a least and a largest value")
    parser.add_argument("--only", default="", help="ways with this in their names")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--limit", type=int, default=64, help="windows of the text, of 512 tokens")
    parser.add_argument("--write", nargs=2, metavar=("FILE", "NAME"), help="put it between the marks cache:NAME")
    options = parser.parse_args()
    shares, windows = [float(s) for s in options.kept.split(",")], [int(w) for w in options.windows.split(",")]
    recipe = Recipe(
        model=options.model,
        ratio=0.0,
        kv_ratio=0.5,
        calibration=options.calibration,
        samples=options.samples,
        seq_len=options.seq_len,
    )
    plan = make_plan(recipe)
    with tempfile.TemporaryDirectory() as place:
        run = Run(Path(place) / "run")
        pipeline.step(STAGES["calibrate"], plan, run)
        moments = Moments(plan, run)
    config = EvaluateConfig(perplexity=(options.text,), seq_len=512, limit=options.limit)
    batches = text_batches(config, load_tokenizer(plan.checkpoint.path, False), Source(options.text, None), 512)
    dense = perplexity(AutoModelForCausalLM.from_pretrained(plan.checkpoint.path, dtype=torch.float32).eval(), batches)
    head = "".join(f" {share:.0%} kept |" for share in shares)
    lines = [f"| perplexity (dense: {dense:.3f}) | exact |{head}", f"|---|---:|{'---:|' * len(shares)}"]
    rounding = [None] if options.bits is None else [None, options.bits]
    for name, way in WAYS.items():
        if options.only not in name:
            continue
        found = [way(moments, share) for share in shares]
        for window, bits in itertools.product(windows, rounding):
            backend = options.backend if bits is not None else None
            models = [with_latents(plan, each, window, None if backend else bits, options.group) for each in found]
            measured = [
                through_cache(model, batches, backend, bits, options.group)
                if backend and bits is not None
                else perplexity(model, batches)
                for model in models
            ]
            cells = [f"{value:.3f}" for value in measured]
            said = name
            if bits is not None:
                width = 2 * options.group if backend else 1  # of which quantized caches keep whole numbers
                numbers = [sum(-(-len(right) // width) * width for _, right in each) for each in found]
                stored = (bits + 32 / options.group) / 16 / sum(map(len, moments.weights))
                by = f" by {backend}" if backend else ""
                said += f"; {bits} bits{by} ({', '.join(f'{number * stored:.1%}' for number in numbers)} kept)"
            lines.append(f"| {said} | {window or '–'} | " + " | ".join(cells) + " |")
            print(lines[-1], flush=True)
    text = "\n".join(lines)
    print(text)
    if options.write:
        file, name = options.write
        write_between(Path(file), f"cache:{name}", text)


if __name__ == "__main__":
    main()
