"""Which ratios can be reached: it follows from shapes and options alone, so that it is known before any work."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from lowrank_compress.allocation.budget import Budget
from lowrank_compress.allocation.choice import Choice
from lowrank_compress.allocation.curve import Curve
from lowrank_compress.allocation.table import ALLOCATORS
from lowrank_compress.allocation.uniform import allocate
from lowrank_compress.config import ScoreConfig
from lowrank_compress.errors import InputError
from lowrank_compress.methods.candidates import Candidates
from lowrank_compress.methods.declared import flag
from lowrank_compress.methods.parts import flag_of
from lowrank_compress.methods.scheme import DENSE as LEFT_DENSE
from lowrank_compress.options import only
from lowrank_compress.stages.bytebudget import require_bytes_reachable
from lowrank_compress.stages.cachebudget import most_stored, require_cache_reachable
from lowrank_compress.stages.curves import lossless_curve
from lowrank_compress.stages.subject import Subject


def budget_of(config: ScoreConfig, subject: Subject) -> Budget:
    """The budget that a ratio means for a model.

    Raises
    ------
    InputError
        The ratio is not between 0 and 1.
    """
    claimed = sum(target.elements for target in subject.resolved.targets)
    if config.ratio_of == "blocks" and len(subject.claimed) > len(subject.resolved.targets):
        raise InputError(
            f"The ratio is a share of the blocks, and {subject.claimed[-1].name} is outside of them. Pass --ratio-of "
            "model, which counts everything."
        )
    whole = sum(parameter.numel() for parameter in subject.model.model.parameters())
    denominator = claimed if config.ratio_of == "blocks" else whole
    if config.bytes is not None:  # what counts is not elements
        return Budget(0.0, denominator, denominator)
    more = most_stored(config, subject.cache) if subject.candidates else 0
    return Budget(config.ratio, denominator, denominator - sum(part.dense for part in subject.candidates), more)


def check_ratio(config: ScoreConfig, subject: Subject) -> None:
    """Refuse a ratio that is out of reach, before any work (see :func:`require_reachable`)."""
    require_cache_reachable(config, subject.cache)
    require_bytes_reachable(config, subject)
    require_reachable(config, budget_of(config, subject), subject.candidates)


def require_reachable(config: ScoreConfig, budget: Budget, candidates: Sequence[Candidates]) -> None:
    """Make sure that a ratio can be reached.

    Raises
    ------
    InputError
        It cannot; the message names the largest one that can, and the options that keep it from being larger.
    """
    if config.bytes is not None or not candidates or (least := _least(config, candidates)) <= budget.limit:
        return
    advice = ["Ask for no more" if budget.largest(least) > 0 else "Change the options"]
    for option, value, loosest, looser in _looser(config):
        if (without := _least(looser, candidates)) < least:
            advice.append(f"{option}{value:g} is in the way, with {option}{loosest:g} it is {budget.largest(without)}")
    if budget.more > 0:
        advice.append(
            f"--kv-ratio stores {budget.more} elements more than it removes, leave it out or let it remove more"
        )
    left = [flag_of(part) for part, method in config.scheme.methods.items() if method == LEFT_DENSE]
    if left:
        advice.append(f"parts of the blocks are left dense, give them a method by {' and '.join(left)}")
    if config.ratio_of == "model":
        advice.append("embeddings and head are not compressed, --ratio-of blocks leaves them out of the count")
    budget.require(least, "; or: ".join(advice) + ".")


def _looser(config: ScoreConfig) -> Iterator[tuple[str, Any, Any, ScoreConfig]]:
    """Options that can keep a ratio out of reach: what they are now, where they do not, and the config with that."""
    yield "--round-to ", config.round_to, 1, config.model_copy(update={"round_to": 1})
    for option in ALLOCATORS[config.allocate].options:
        if option.loosest is not None:
            options = config.options | {option.name: option.loosest}
            yield (
                flag(option),
                config.options[option.name],
                option.loosest,
                config.model_copy(update={"options": options}),
            )


def _least(config: ScoreConfig, candidates: Sequence[Candidates]) -> int:
    """The fewest elements that all candidates together can be stored in."""
    allocator = ALLOCATORS[config.allocate]
    curves = [curve for part in candidates for curve in _smallest(_usable(config, part))]
    return allocator.least(curves, **only(allocator.options, config.options))


def _usable(config: ScoreConfig, part: Candidates) -> list[list[Curve]]:
    """Curves of the alternatives that the allocator can choose among, without losses."""
    usable = part.each if ALLOCATORS[config.allocate].needs_loss else part.each[:1]
    return [[lossless_curve(group, config) for group in candidate] for candidate in usable]


def _smallest(each: list[list[Curve]]) -> list[Curve]:
    return min(each, key=lambda curves: sum(int(curve.stored[0]) for curve in curves))


def uniform_choices(config: ScoreConfig, budget: Budget, candidates: Sequence[Candidates]) -> dict[str, Choice]:
    """Choices that keep the same share of everything, by the group's name.

    They are those of the first alternative of each part, or of the smallest where the first ones cannot be stored in so
    little.
    """
    curves = [curve for part in candidates for curve in _usable(config, part)[0]]
    if sum(int(curve.stored[0]) for curve in curves) > budget.limit:
        curves = [curve for part in candidates for curve in _smallest(_usable(config, part))]
    chosen = allocate(curves, budget.limit) if curves else []
    return {curve.name: curve.choice(point) for curve, point in zip(curves, chosen, strict=True)}
