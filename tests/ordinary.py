"""What the package computes block by block, computed the ordinary way: the whole model in memory, hooks, autograd.

Nothing here uses the package, its table of architectures included: where the parts of a fused weight are is said again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tests.tiny import MODELS, MORE_MODELS, PAD, Task, tiny_model

LM = [name for name, (_, task, _) in MODELS.items() if task == "lm"]
CLASSIFIERS = [name for name, (_, task, _) in MODELS.items() if task == "classification"]


class Saved:
    """Tiny checkpoints without a tokenizer, by the name of their case; written once."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __call__(self, case: str, dtype: torch.dtype = torch.float32, **overrides: Any) -> Path:
        """Return the directory of a case's checkpoint; `overrides` are configuration fields."""
        model_type, task, fields = (MODELS | MORE_MODELS)[case]
        path = self.place / "-".join([case, str(dtype), *(f"{name}={value}" for name, value in overrides.items())])
        if not path.exists():
            tiny_model(model_type, task, dtype=dtype, **(fields | overrides)).save_pretrained(path)
        return path


def task(case: str) -> Task:
    """Return what the head of a case's model does."""
    return (MODELS | MORE_MODELS)[case][1]


def load(path: Path, kind: Task, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """Load a checkpoint whole, with the class that everybody uses."""
    auto = AutoModelForCausalLM if kind == "lm" else AutoModelForSequenceClassification
    model = auto.from_pretrained(path, dtype=dtype).eval()
    assert model.dtype == dtype
    return model


def tokens(*lengths: int, seed: int = 0) -> list[Tensor]:
    """Return random sequences (length,) of ordinary tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(4, 96, (length,), generator=generator) for length in lengths]


def padded(sequences: Sequence[Tensor], width: int = 0, left: Sequence[int] = ()) -> tuple[Tensor, Tensor]:
    """Pad sequences to one length, those numbered in `left` on the left; ids and mask, (sequences, length)."""
    width = max(width, *(len(ids) for ids in sequences))
    ids = torch.full((len(sequences), width), PAD)
    mask = torch.zeros_like(ids)
    for number, sequence in enumerate(sequences):
        start = width - len(sequence) if number in left else 0
        ids[number, start : start + len(sequence)] = sequence
        mask[number, start : start + len(sequence)] = 1
    return ids, mask


def summed_loss(model: PreTrainedModel, ids: Tensor, label: int | None) -> tuple[Tensor, int]:
    """Summed loss of one sequence (length,), and of how many terms: its tokens but the first, or one label."""
    logits = model(input_ids=ids[None], use_cache=False).logits if label is None else model(input_ids=ids[None]).logits
    if label is not None:
        return -logits[0].log_softmax(-1)[label], 1
    likelihoods = logits[0, :-1].log_softmax(-1)
    return -sum((likelihoods[i, ids[i + 1]] for i in range(len(ids) - 1)), torch.zeros(())), len(ids) - 1


def part_rows(model: PreTrainedModel, target: str) -> tuple[str, Tensor]:
    """Split a target's name into its module's path and its rows in the module's output."""
    path, _, role = target.partition(":")
    module: Any = model.get_submodule(path)
    total = module.weight.shape[1] if isinstance(module, Conv1D) else module.weight.shape[0]
    if not role:
        return path, torch.arange(total)
    config = model.config
    heads = config.num_attention_heads
    if getattr(config, "new_decoder_architecture", False):
        keys = config.num_kv_heads
        parts = torch.arange(total).view(keys, heads // keys + 2, -1).split([heads // keys, 1, 1], 1)
        return path, parts["qkv".index(role)].flatten()
    if config.model_type in ("gpt_neox", "bloom", "persimmon") or getattr(config, "multi_query", True) is False:
        return path, torch.arange(total).view(heads, 3, -1)[:, "qkv".index(role)].flatten()
    if role in ("gate", "up"):
        return path, torch.arange(total).chunk(2)[("gate", "up").index(role)]
    keys = key_heads(config)
    size = total // (heads + 2 * keys)
    return path, torch.arange(total).split([heads * size, keys * size, keys * size])["qkv".index(role)]


def key_heads(config: Any) -> int:
    """Count the key-value heads that a model's configuration implies."""
    if getattr(config, "multi_query", False):
        return 1
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def matrix(model: PreTrainedModel, target: str) -> Tensor:
    """Return a target's weight (out, in)."""
    path, rows = part_rows(model, target)
    module: Any = model.get_submodule(path)
    return (module.weight.T if isinstance(module, Conv1D) else module.weight)[rows]


@dataclass
class Trace:
    """What one sequence does at one module.

    Attributes
    ----------
    x, y, z, g
        Inputs (tokens, in), outputs without bias and with it (tokens, out), gradients in the outputs (tokens, out).
    weight_gradient
        ∂ℒ/∂W of the sequence, (out, in).
    """

    x: Tensor
    y: Tensor
    z: Tensor
    g: Tensor
    weight_gradient: Tensor


@contextmanager
def watched(model: PreTrainedModel, paths: Sequence[str]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Keep the input and output of modules while inside."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            seen[path] = (args[0], out)

        return hook

    handles = [model.get_submodule(path).register_forward_hook(keep(path)) for path in paths]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def traces(
    model: PreTrainedModel, targets: Sequence[str], sequences: Sequence[Tensor], labels: Sequence[int] | None
) -> tuple[dict[str, list[Trace]], int]:
    """Run every sequence by itself, unpadded: what each target sees, and the number of terms in all losses."""
    found: dict[str, list[Trace]] = defaultdict(list)
    terms = 0
    places = {target: part_rows(model, target) for target in targets}
    paths = sorted({path for path, _ in places.values()})
    for number, ids in enumerate(sequences):
        with watched(model, paths) as seen:
            loss, count = summed_loss(model, ids, None if labels is None else labels[number])
        terms += count
        modules: dict[str, Any] = {path: model.get_submodule(path) for path in paths}
        wanted = [seen[path][1] for path in paths] + [modules[path].weight for path in paths]
        gradients = torch.autograd.grad(loss, wanted)
        for target, (path, rows) in places.items():
            x, out = (value.detach().reshape(len(ids), -1) for value in seen[path])
            bias = modules[path].bias
            g, weight_gradient = gradients[paths.index(path)], gradients[len(paths) + paths.index(path)]
            if isinstance(modules[path], Conv1D):
                weight_gradient = weight_gradient.T
            y = out if bias is None else out - bias.detach()
            g = g.reshape(len(ids), -1)
            found[target].append(Trace(x, y[:, rows], out[:, rows], g[:, rows], weight_gradient[rows]))
    return dict(found), terms


def statistics(seen: Sequence[Trace], weight: Tensor, terms: int) -> dict[str, Tensor]:
    """Statistics of one target, each by its definition, token by token; without those by head."""
    x, y, g = (torch.cat([getattr(trace, name) for trace in seen]) for name in ("x", "y", "g"))
    delta = g @ weight.detach()
    count = len(x)
    return {
        "in_gram": torch.einsum("ti,tj->ij", x, x) / count,
        "in_mean": x.sum(0) / count,
        "in_abs": x.abs().sum(0) / count,
        "in_square": (x * x).sum(0) / count,
        "out_gram": torch.einsum("ti,tj->ij", y, y) / count,
        "out_fisher": torch.einsum("ti,tj->ij", g, g) / terms,
        "in_fisher": torch.einsum("ti,tj->ij", delta, delta) / terms,
        "out_square": (g * g).sum(0) / terms,
        "row_fisher": sum((trace.weight_gradient**2 for trace in seen), torch.zeros(())).sum(1) / terms,
    }


def head_statistics(model: PreTrainedModel, role: str, seen: Sequence[Trace], terms: int) -> dict[str, Tensor]:
    """Statistics by head of one target, each by its definition, a head and a token at a time; none but for q, k, v."""
    if role not in ("q", "k", "v"):
        return {}
    query: int = model.config.num_attention_heads
    key = key_heads(model.config)
    heads = query if role == "q" else key
    zs, gs = ([row.chunk(heads) for trace in seen for row in getattr(trace, name)] for name in ("z", "g"))
    found = {
        "head_gram": torch.stack([sum(torch.outer(z[head], z[head]) for z in zs) for head in range(heads)]) / len(zs),
        "head_fisher": torch.stack([sum(torch.outer(g[head], g[head]) for g in gs) for head in range(heads)]) / terms,
    }
    if role == "q":
        fishers = []
        for group in range(key):
            members = [head for head in range(query) if head * key // query == group]
            ts = [sum(z[head] * g[head] for head in members) for z, g in zip(zs, gs, strict=True)]
            fishers.append(sum(torch.outer(t, t) for t in ts) / terms)
        found["score_fisher"] = torch.stack(fishers)
    return found


def influences(model: PreTrainedModel, blocks: Sequence[str], sequences: Sequence[Tensor]) -> list[float]:
    """1 − the mean over all tokens of the cosine between a block's input and output, for each block by its path."""
    turned: dict[str, list[float]] = defaultdict(list)
    for ids in sequences:
        with torch.no_grad(), watched(model, blocks) as seen:
            model(input_ids=ids[None])
        for path in blocks:
            left = seen[path][1][0]
            left = left[0] if left.ndim == 3 else left  # of a block that returns a tuple
            for before, after in zip(seen[path][0][0], left, strict=True):
                turned[path].append(1 - float(before @ after / (before @ before * (after @ after)).sqrt()))
    return [sum(turned[path]) / len(turned[path]) for path in blocks]
