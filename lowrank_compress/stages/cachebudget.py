"""The second budget: numbers that the cache keeps of a token, and how they are shared by the blocks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from typing import Any

from lowrank_compress.allocation.choice import Choice
from lowrank_compress.allocation.curve import Curve
from lowrank_compress.allocation.loss import allocate
from lowrank_compress.config import ScoreConfig
from lowrank_compress.errors import InputError
from lowrank_compress.methods.candidates import Candidates, first_groups
from lowrank_compress.methods.groups import TargetGroup, dense_elements, price_of


def limit_of(config: ScoreConfig, subject_cache: Sequence[Candidates]) -> int:
    """How many numbers of a token all blocks together may cache, so that at least the share asked for disappears."""
    assert config.kv_ratio is not None
    return most_kept(config.kv_ratio, stock(first_groups(subject_cache)))


def most_kept(ratio: float, whole: int) -> int:
    """How many of so many numbers stay at most, so that at least this share disappears."""
    return whole - math.ceil(Fraction(str(ratio)) * whole)


def cached_at(group: TargetGroup, choice: Choice) -> int:
    """Numbers that the cache keeps of a token at a choice; 0 of a group that is none of the cache."""
    return group.cached if choice.is_dense or not group.cached else choice.parameters[0]


def stock(groups: Iterable[TargetGroup]) -> int:
    """Numbers that a stock cache keeps of a token."""
    return sum(group.cached for group in groups)


def kept(groups: Iterable[TargetGroup], choices: Mapping[str, Choice]) -> int:
    """Numbers of a token that are cached at these choices."""
    return sum(cached_at(group, choices[group.name]) for group in groups)


def require_cache_reachable(config: ScoreConfig, cache: Sequence[Candidates]) -> None:
    """Make sure that the cache can be made so small.

    Raises
    ------
    InputError
        It cannot; the message names the largest ratio that can be reached.
    """
    if config.kv_ratio is not None:
        groups = first_groups(cache)
        require_reachable(config.kv_ratio, config.round_to, groups, stock(groups))


def require_reachable(ratio: float, round_to: int, groups: Sequence[TargetGroup], whole: int) -> None:
    """Make sure of the same for groups of a model whose stock cache keeps so many numbers of a token.

    Raises
    ------
    InputError
        As `require_cache_reachable`.
    """
    least = sum(int(group.choices(group.formats[0], round_to).stored[:1].sum()) or group.cached for group in groups)
    if least > most_kept(ratio, whole):
        largest = math.floor(Fraction(whole - least, whole) * 10**4) / 10**4
        raise InputError(
            f"A --kv-ratio of {ratio} is out of reach: of {whole} numbers that the cache keeps of a token, {least} "
            "stay at the smallest latents. "
            + (f"The largest reachable one is {largest}. " if largest > 0 else "None can go. ")
            + ("Ask for no more." if round_to == 1 else "Ask for no more, or pass a smaller --round-to.")
        )


def most_stored(config: ScoreConfig, cache: Sequence[Candidates]) -> int:
    """The most elements that are stored more than by the dense matrices, or fewer if negative, whatever the ranks.

    All factors of a model have as many elements for each number that is cached, so that only their sum counts.
    """
    if config.kv_ratio is None:
        return 0
    groups, limit = first_groups(cache), limit_of(config, cache)
    each = [(group, group.choices(group.formats[0], config.round_to)) for group in groups]
    price = max(
        price_of(group, choices[0]).elements / int(choices.stored[0]) for group, choices in each if len(choices)
    )
    dense = sum(dense_elements(group) for group in groups)
    return math.ceil(limit * price) - dense


def choose_cache(
    config: ScoreConfig, cache: Sequence[Candidates], curves: Mapping[str, Curve]
) -> tuple[dict[str, Choice], float]:
    """Choose what each block caches, by the least predicted loss; and say what that is, in nats."""
    groups = first_groups(cache)
    if not groups:
        return {}, 0.0
    own = [curves[group.name] for group in groups]
    chosen = allocate(own, limit_of(config, cache))
    pairs = list(zip(own, chosen, strict=True))
    return {curve.name: curve.choice(point) for curve, point in pairs}, float(sum(c.loss[p] for c, p in pairs))


def cache_report(
    groups: Sequence[TargetGroup], choices: Mapping[str, Choice], asked: float | None, window: int | None
) -> dict[str, Any]:
    """Say what the cache keeps; nothing of a stock one.

    Returns
    -------
    dict
        Nothing, or ``{"cache": {"asked", "reached", "dense", "kept", "window"}}``: shares that are removed, and
        numbers of a token, without the window.
    """
    own = [group for group in groups if group.cached]
    if window is None or not own:
        return {}
    dense, now = stock(own), kept(own, choices)
    return {"cache": {"asked": asked, "reached": 1 - now / dense, "dense": dense, "kept": now, "window": window}}
