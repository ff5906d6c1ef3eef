"""What a budget in bytes means for a model, from shapes alone."""

from __future__ import annotations

import math
from fractions import Fraction

import torch

from lowrank_compress.allocation.choice import DENSE
from lowrank_compress.config import ByteBudget, ScoreConfig
from lowrank_compress.errors import InputError
from lowrank_compress.evaluation.size import weight_bytes
from lowrank_compress.formats.packed import BITS, Packing, scale_dtype
from lowrank_compress.methods.few_bits import bytes_of
from lowrank_compress.methods.groups import TargetGroup
from lowrank_compress.stages.subject import Subject

QUANTIZED = "quantized"


def packing_of(budget: ByteBudget) -> Packing:
    """Say how matrices are packed."""
    return Packing(budget.group, True, scale_dtype(getattr(torch, budget.dtype)))


def itemsize_of(config: ScoreConfig) -> int:
    """Bytes of a weight that is not packed."""
    assert config.bytes is not None
    return getattr(torch, config.bytes.dtype).itemsize


def limit_of(budget: ByteBudget, subject: Subject) -> int:
    """How many bytes the candidates may take together: what the share leaves beside claimed weights that stay."""
    claimed = subject.resolved.targets
    others = sum(target.elements for target in claimed) - sum(part.dense for part in subject.candidates)
    return most_bytes(budget, subject) - others * getattr(torch, budget.dtype).itemsize


def most_bytes(budget: ByteBudget, subject: Subject) -> int:
    """How many bytes all claimed weights may take together."""
    return math.floor(Fraction(str(budget.share)) * original_bytes(subject))


def original_bytes(subject: Subject) -> int:
    """Bytes of all claimed weights in the original."""
    return sum(weight_bytes(subject.model, target) for target in subject.resolved.targets)


def require_bytes_reachable(config: ScoreConfig, subject: Subject) -> None:
    """Make sure, from shapes alone, that a model can be stored in so few bytes.

    Raises
    ------
    InputError
        It cannot; the message names the smallest share.
    """
    budget = config.bytes
    if budget is None:
        return
    packing, narrow = packing_of(budget), budget.mix != QUANTIZED
    least = sum(
        min(sum(_least(group, config, packing, narrow) for group in each) for each in part.each)
        for part in subject.candidates
    )
    _require(least, budget, subject)


def _least(group: TargetGroup, config: ScoreConfig, packing: Packing, narrow: bool) -> int:
    """The fewest bytes of a group, dense or, if it may be `narrow`, compressed."""
    formats = [format for format in ("pair", "width") if format in group.formats]
    smallest = [group.choices(format, config.round_to)[0] for format in formats if len(group.choices(format))]
    return min(bytes_of(group, choice, packing, BITS[0]) for choice in (DENSE, *(smallest if narrow else ())))


def _require(least: int, budget: ByteBudget, subject: Subject) -> None:
    limit = limit_of(budget, subject)
    if least <= limit:
        return
    smallest = math.ceil(Fraction(most_bytes(budget, subject) - limit + least, original_bytes(subject)) * 10**4) / 10**4
    raise InputError(
        f"--bytes {budget.share} is out of reach: of {original_bytes(subject):,} bytes of the original at least "
        f"{most_bytes(budget, subject) - limit + least:,} stay, with {BITS[0]} bits a weight"
        + (" and all matrices as large as they are" if budget.mix == QUANTIZED else "")
        + f". The smallest share is {smallest}."
    )
