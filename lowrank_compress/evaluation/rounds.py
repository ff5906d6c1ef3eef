"""Measure several things in turn and compare them round by round, so that noise falls on all of them alike."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Rates = Mapping[str, float]


def orders(names: Sequence[str], rounds: int) -> list[list[str]]:
    """In which order each round measures: every name once, each round beginning with the next one."""
    return [[names[(first + place) % len(names)] for place in range(len(names))] for first in range(rounds)]


def alternate(
    names: Sequence[str],
    rounds: int,
    measure: Callable[[str], Rates],
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, list[Rates]]:
    """Measure all models in turn, after a round that warms up and is not counted.

    Returns
    -------
    dict
        Name -> what `measure` returned, in the order of the rounds.
    """
    samples: dict[str, list[Rates]] = {name: [] for name in names}
    total = (rounds + 1) * len(names)
    done = 0
    for number, order in enumerate(orders(names, rounds + 1)):
        for name in order:
            found = measure(name)
            if number > 0:
                samples[name].append(found)
            done += 1
            advance(done, total)
    return samples


def compare(samples: Mapping[str, Sequence[Rates]], base: str) -> dict[str, dict[str, Any]]:
    """Median rates, and their ratios to the base's of the same round.

    Returns
    -------
    dict
        Name -> phase -> ``tokens_per_second`` (the median), ``samples`` (all) and ``ratio``: ``median``, ``min``,
        ``max``.
    """
    compared: dict[str, dict[str, Any]] = {}
    for name, rates in samples.items():
        compared[name] = {}
        for phase in rates[0]:
            ratios = [own[phase] / other[phase] for own, other in zip(rates, samples[base], strict=True)]
            compared[name][phase] = {
                "tokens_per_second": statistics.median(own[phase] for own in rates),
                "samples": [own[phase] for own in rates],
                "ratio": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
            }
    return compared
