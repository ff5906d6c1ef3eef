"""The other answer to everything: transformers' own loading, a plain loop over windows, plain decompositions."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from mutations.place import SEQ_LEN, Check, Said, json_of

TOLERANCE = 1e-5


class Refused(Exception):
    """Transformers does not give a whole model."""


def load(path: Path | str, kind: str = "lm") -> tuple[PreTrainedModel, dict[str, Any]]:
    """Load a checkpoint as everybody does, to compute in float32; with what transformers found out.

    Raises
    ------
    Refused
        Some of its weights would be random.
    """
    auto: Any = AutoModelForCausalLM if kind == "lm" else AutoModelForSequenceClassification
    model, found = auto.from_pretrained(path, output_loading_info=True)
    missing = {name for name in found["missing_keys"] if "lora_magnitude_vector" not in name}
    if (Path(path) / "adapter_config.json").exists() and not missing:
        return _by_peft(auto, Path(path)), found | {"unexpected_keys": ()}
    if found["missing_keys"] or found["mismatched_keys"] or found.get("error_msgs"):
        raise Refused(f"missing {sorted(found['missing_keys'])}, of other shapes {sorted(found['mismatched_keys'])}")
    return model.float().eval(), found


def _tokenizer_of(path: Path) -> Path:
    """Where a checkpoint's tokenizer is: an adapter without one has that of its base."""
    if (path / "adapter_config.json").exists() and not (path / "tokenizer_config.json").exists():
        return Path(json.loads((path / "adapter_config.json").read_text())["base_model_name_or_path"])
    return path


def _by_peft(auto: Any, path: Path) -> PreTrainedModel:
    """Load an adapter with PEFT and merge it: transformers leaves some magnitudes random that PEFT has read."""
    base = json.loads((path / "adapter_config.json").read_text())["base_model_name_or_path"]
    model: Any = PeftModel.from_pretrained(auto.from_pretrained(base), str(path))
    return model.merge_and_unload().float().eval()


@torch.no_grad()
def perplexity(path: Path | str, text: str, seq_len: int = SEQ_LEN, limit: int | None = None) -> tuple[float, int]:
    """Perplexity of a text and its number of scored tokens, a window at a time."""
    model, _ = load(path)
    tokenizer = AutoTokenizer.from_pretrained(_tokenizer_of(Path(path)))
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    first = tokenizer("a")["input_ids"][:1]
    bos = [tokenizer.bos_token_id] if first == [tokenizer.bos_token_id] else []
    if bos:
        windows = [bos + ids[start : start + seq_len - 1] for start in range(0, len(ids), seq_len - 1)]
    else:
        windows = [ids[start : start + seq_len] for start in range(0, len(ids) - 1, seq_len - 1)]
    nats, count = 0.0, 0
    for window in windows[:limit]:
        inputs = torch.tensor([window])
        logits = model(input_ids=inputs).logits[0, :-1].double()
        nats -= float(torch.log_softmax(logits, -1).gather(1, inputs[0, 1:, None]).sum())
        count += len(window) - 1
    return math.exp(nats / count) if nats / count < 700 else math.inf, count


@torch.no_grad()
def accuracy(path: Path | str, texts: Sequence[str], labels: Sequence[int], seq_len: int) -> float:
    """Share of examples that a classifier gets right, one at a time."""
    model, _ = load(path, "classification")
    tokenizer = AutoTokenizer.from_pretrained(path)
    right = 0
    for text, label in zip(texts, labels, strict=True):
        inputs = tokenizer(text, truncation=True, max_length=seq_len, return_tensors="pt")
        right += int(model(**inputs).logits[0].argmax()) == label
    return right / len(texts)


def same_perplexity(path: Path | str, text: str | None, seq_len: int = SEQ_LEN, limit: int | None = None) -> Check:
    """Compare the one perplexity that `lrc eval` prints with that of transformers on a text.

    Without a text (none is known to be right), any success is wrong.
    """

    def check(said: Said) -> str | None:
        (values,) = json_of(said)["perplexity"].values()
        got = values.get("compressed", values.get("dense"))
        if text is None:
            return f"perplexity {got} of something that is no text"
        try:
            expected, tokens = perplexity(path, text, seq_len, limit)
        except Exception as problem:
            return f"perplexity {got}, where transformers refuses: {type(problem).__name__}: {str(problem)[:160]}"
        if values["tokens"] != tokens:
            return f"{values['tokens']} tokens, expected {tokens}"
        return unlike("perplexity", got, expected) or unmentioned(path, said)

    return check


def unlike(what: str, got: float | None, expected: float, tolerance: float = TOLERANCE) -> str | None:
    """Complain about a number that is another; JSON has no infinity."""
    if expected == math.inf and (got is None or got > 1e300):
        return None
    if got is None or not math.isfinite(got) or abs(got - expected) > tolerance * abs(expected):
        return f"{what} is {got}, expected {expected}"
    return None


def unmentioned(path: Path | str, said: Said, kind: str = "lm") -> str | None:
    """Complain about tensors of a checkpoint that were dropped without a word."""
    dropped = sorted(load(path, kind)[1]["unexpected_keys"])
    if dropped and "Warning" not in said.err:
        return f"{len(dropped)} tensors were dropped without a word: {dropped[:3]}"
    return None


@torch.no_grad()
def logits(path: Path | str, kind: str = "lm") -> Tensor:
    """What a model says to 12 tokens."""
    model, _ = load(path, kind)
    embedding: Any = model.get_input_embeddings()
    vocabulary = len(embedding.weight)
    ids = torch.arange(12)[None] * 7 % vocabulary
    model.config.return_dict = True  # its own form of results is no matter of what it computes
    return model(input_ids=ids).logits.double()


def far(got: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Tell whether two tensors differ by more than a share of the larger one's norm; what overflowed says nothing."""
    if got.shape == expected.shape and not bool(expected.isfinite().all() & got.isfinite().all()):
        return False
    return (
        got.shape != expected.shape or not float((got - expected).norm()) <= tolerance * float(expected.norm()) + 1e-12
    )


def same_logits(compressed: Path, dense: Path, kind: str = "lm") -> Check:
    """Compare what a compressed checkpoint and its dense export say."""

    def check(said: Said) -> str | None:
        tolerance = 1e-4 if stored_dtype(dense) == "float32" else 3e-2
        if far(logits(dense, kind), logits(compressed, kind), tolerance):
            return "the dense export says something else than the compressed checkpoint"
        return None

    return check


def stored_dtype(path: Path) -> str:
    """The dtype that a config names."""
    return json.loads((path / "config.json").read_text()).get("dtype", "float32")


def best_factors(base: Path, run: Path, dense: Path, kind: str = "lm") -> Check:
    """Compare the dense export of an `svd` run with singular value decompositions of what transformers loads."""

    def check(said: Said) -> str | None:
        try:
            original = load(base, kind)[0].state_dict()
        except Exception as problem:
            return f"compressed what transformers refuses: {type(problem).__name__}: {str(problem)[:160]}"
        ranks = json.loads((run / "scores/ranks.json").read_text())["matrices"]
        if any(type(module).__name__ == "Conv1D" for module in load(base, kind)[0].modules()):
            return None  # fused, and the other way round
        tolerance = 1e-4 if stored_dtype(dense) == "float32" else 3e-2
        for key, found in load(dense, kind)[0].state_dict().items():
            for name, got, expected in zip(*_matrices(key, found), _matrices(key, original[key])[1], strict=True):
                rank = ranks.get(name.removesuffix(".weight"), {}).get("rank")
                best = expected.double()
                if rank is not None:
                    u, s, v = torch.linalg.svd(best, full_matrices=False)
                    best = (u[:, :rank] * s[:rank]) @ v[:rank]
                if far(got.double(), best, tolerance):
                    return f"{name} is not what the checkpoint's own would give"
        return None

    return check


def _matrices(name: str, tensor: Tensor) -> tuple[list[str], list[Tensor]]:
    """Take the matrices of experts, which transformers stacks, out of a tensor, with the names that runs have."""
    path, _, leaf = name.rpartition(".")
    leaves = {"gate_up_proj": ("lr_gating", "lr_up"), "down_proj": ("lr_down",)}.get(leaf)
    if tensor.ndim != 3 or leaves is None:
        return [name], [tensor]
    names = [f"{path}.{number}.{own}" for number in range(len(tensor)) for own in leaves]
    return names, [part for expert in tensor for part in expert.chunk(len(leaves))]


def whole(path: Path | str, kind: str = "lm") -> Callable[[], object]:
    """Load a checkpoint and run it by transformers."""
    return lambda: logits(path, kind)


def loads_with(path: Path | str, text: str) -> Callable[[], object]:
    """Measure a checkpoint by transformers."""
    return lambda: perplexity(path, text)


def every(*checks: Check) -> Check:
    """The first complaint of several checks."""
    return lambda said: next((wrong for check in checks if (wrong := check(said)) is not None), None)
