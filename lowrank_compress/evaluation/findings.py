"""What a comparison found, in the form in which JSON has it: the first model is called a, the second b."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lowrank_compress.evaluation.contrast import Contrast, Gap
from lowrank_compress.evaluation.embedded import cosines, rank_correlation
from lowrank_compress.evaluation.harness import Answers
from lowrank_compress.evaluation.paired import McNemar, bootstrap, mcnemar, ranked

SIDES = ("a", "b")


@dataclass(frozen=True)
class Draws:
    """How a confidence interval is drawn; see `paired.bootstrap`."""

    seed: int = 0
    resamples: int = 10_000
    confidence: float = 0.95


def of_text(made: Contrast, draws: Draws) -> dict[str, Any]:
    """Say what two language models make of a text."""
    return {
        "tokens": sum(made.tokens),
        "windows": len(made.tokens),
        "perplexity": {side: made.perplexity(model) for model, side in enumerate(SIDES)},
        **_difference(made, draws),
        **_predictions(made),
    }


def of_examples(made: Contrast, draws: Draws) -> dict[str, Any]:
    """Say what two classifiers make of examples."""
    count = len(made.tokens)
    return {
        "n": count,
        "accuracy": {side: sum(made.right[model]) / count for model, side in enumerate(SIDES)},
        "test": _tested(mcnemar(*made.right)),
        **_difference(made, draws),
        **_predictions(made),
    }


def of_pairs(
    made: Contrast, firsts: Sequence[int], seconds: Sequence[int], scores: Sequence[float], draws: Draws
) -> dict[str, Any]:
    """Say what two embedding models make of pairs of texts, given by the texts' numbers, with scores."""
    sides = [torch.stack([embedded[text] for text in range(len(embedded))]) for embedded in made.embedded]
    alike = [cosines(side[list(firsts)], side[list(seconds)]).tolist() for side in sides]
    how = {"seed": draws.seed, "resamples": draws.resamples, "confidence": draws.confidence}
    near = cosines(*sides)
    return {
        "n": len(scores),
        "texts": len(near),
        "correlation": {side: rank_correlation(each, scores) for side, each in zip(SIDES, alike, strict=True)},
        "difference": vars(ranked(alike[0], alike[1], scores, **how)),
        "cosine": vars(bootstrap(near.tolist(), [1.0] * len(near), **how)),
        "lowest_cosine": float(near.min()),
        "confidence": draws.confidence,
        **_states(made),
    }


def _difference(made: Contrast, draws: Draws) -> dict[str, Any]:
    """Nats a token that B loses more than A, with the interval, and the same as a ratio of perplexities."""
    first, second = made.nats
    gaps = [other - one for one, other in zip(first, second, strict=True)]
    drawn = bootstrap(gaps, made.tokens, seed=draws.seed, resamples=draws.resamples, confidence=draws.confidence)
    ratio = {name: None if nats is None else _exp(nats) for name, nats in vars(drawn).items()}
    return {"difference": vars(drawn), "ratio": ratio, "confidence": draws.confidence}


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf


def _predictions(made: Contrast) -> dict[str, Any]:
    return {
        "divergence": made.divergence / made.positions,
        "agreement": made.agreeing / made.positions,
        **_states(made),
    }


def _states(made: Contrast) -> dict[str, Any]:
    return {
        "embedding": _gap(made.embedding),
        "blocks": [
            {"block": number, **_gap(block.error), "own_error": block.own.relative}
            for number, block in enumerate(made.blocks)
        ],
    }


def _gap(gap: Gap) -> dict[str, float]:
    return {"error": gap.relative, "cosine": gap.cosine}


def _tested(found: McNemar) -> dict[str, Any]:
    return {"only_a": found.only_first, "only_b": found.only_second, "p_value": found.p_value}


def of_tasks(answers: Sequence[Answers]) -> dict[str, Any]:
    """Values of both, and where each example is right or wrong, McNemar's test."""
    found: dict[str, Any] = {}
    one, other = answers
    for task, values in one.values.items():
        for metric, value in values.items():
            if "stderr" in metric:
                continue
            entry: dict[str, Any] = {"a": value, "b": other.values[task].get(metric)}
            pairs = [each.examples.get(task, {}).get(metric, ()) for each in answers]
            if pairs[0] and {*pairs[0], *pairs[1]} <= {0.0, 1.0}:
                entry["n"] = len(pairs[0])
                entry["test"] = _tested(mcnemar(*([bool(right) for right in each] for each in pairs)))
            found.setdefault(task, {})[metric] = entry
    return found
