"""What a comparison found, in the form in which JSON has it: the first model is called a, the second b."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from lowrank_compress.evaluation.contrast import Contrast, Gap
from lowrank_compress.evaluation.embedded import cosines, rank_correlation
from lowrank_compress.evaluation.exam import Exam
from lowrank_compress.evaluation.harness import Answers
from lowrank_compress.evaluation.measures import RIGHT, of_scores
from lowrank_compress.evaluation.paired import McNemar, bootstrap, mcnemar, resampled

SIDES = ("a", "b")


@dataclass(frozen=True)
class Draws:
    """How a confidence interval is drawn; see `paired.bootstrap`."""

    seed: int = 0
    resamples: int = 10_000
    confidence: float = 0.95


def of_text(made: Contrast, draws: Draws, windows: Sequence[int] | None = None) -> dict[str, Any]:
    """Say what two language models make of a text.

    Parameters
    ----------
    windows
        Of which window each sequence is; None where each is one of its own.
    """
    difference = _difference(made, draws, windows)
    return {
        "tokens": sum(made.terms),
        "windows": len(made.terms) if windows is None else len(set(windows)),
        "perplexity": {side: made.perplexity(model) for model, side in enumerate(SIDES)},
        "difference": difference,
        "ratio": {name: None if nats is None else _exp(nats) for name, nats in difference.items()},
        "confidence": draws.confidence,
        **_predictions(made),
    }


def of_examples(made: Contrast, exam: Exam, draws: Draws) -> dict[str, Any]:
    """Say what two models make of labelled examples."""
    one, other = (exam.examples(np.concatenate(rows)) for rows in made.rows)
    gaps = resampled(one, other, exam.measures, **asdict(draws))
    metrics: dict[str, Any] = {}
    for name, measure in exam.measures.items():
        metrics[name] = {"a": float(measure(one)), "b": float(measure(other)), "difference": vars(gaps[name])}
        if name in RIGHT and exam.unit == "examples":
            alone = ([bool(right) for right in measure(rows[:, None])] for rows in (one, other))
            metrics[name]["test"] = _tested(mcnemar(*alone))
    return {
        "n": exam.count(one),
        "examples": len(one),
        "unit": exam.unit,
        "metrics": metrics,
        "loss": {side: made.loss(model) for model, side in enumerate(SIDES)},
        "difference": _difference(made, draws, exam.parts),
        "confidence": draws.confidence,
        **_predictions(made),
    }


def of_pairs(
    made: Contrast, firsts: Sequence[int], seconds: Sequence[int], scores: Sequence[float], draws: Draws
) -> dict[str, Any]:
    """Say what two embedding models make of pairs of texts, given by the texts' numbers, with scores."""
    sides = [torch.stack([embedded[text] for text in range(len(embedded))]) for embedded in made.embedded]
    alike = [cosines(side[list(firsts)], side[list(seconds)]).tolist() for side in sides]
    ranks = {"spearman": of_scores(1)["spearman"]}
    near = cosines(*sides)
    one, other = (np.stack([each, scores], 1) for each in alike)
    gaps = resampled(one, other, ranks, **asdict(draws))
    return {
        "n": len(scores),
        "texts": len(near),
        "correlation": {side: rank_correlation(each, scores) for side, each in zip(SIDES, alike, strict=True)},
        "difference": vars(gaps["spearman"]),
        "cosine": vars(bootstrap(near.tolist(), [1.0] * len(near), **asdict(draws))),
        "lowest_cosine": float(near.min()),
        "confidence": draws.confidence,
        **_states(made),
    }


def _difference(made: Contrast, draws: Draws, parts: Sequence[int] | None) -> dict[str, Any]:
    """How much more B loses than A, of each term of the loss, with the interval; of `parts` all are drawn together."""
    numbers = list(range(len(made.terms))) if parts is None else parts
    first, second = (np.bincount(numbers, losses) for losses in made.losses)
    terms = np.bincount(numbers, made.terms)
    return vars(bootstrap((second - first).tolist(), terms.tolist(), **asdict(draws)))


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf


def _predictions(made: Contrast) -> dict[str, Any]:
    return {
        "divergence": made.divergence / sum(made.terms),
        "agreement": made.agreeing / made.choices if made.choices else None,
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
