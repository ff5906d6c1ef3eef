"""More removed from the blocks that change their input less."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from lowrank_compress.allocation import uniform
from lowrank_compress.allocation.curve import Curve, least_stored, require_reachable, stored_total
from lowrank_compress.errors import InputError


def allocate(curves: Sequence[Curve], limit: int, *, temperature: float | None = None, cap: float = 1.0) -> np.ndarray:
    """Remove from each block a share proportional to exp(−s / temperature), s its influence.

    The global sparsity allocation of MoDeGPT (Lin et al., ICLR 2025, section 3.3): the shares φ maximise
    Σ_b s_b (1 − φ_b) + temperature · entropy(φ) with their mean fixed. Here that mean counts elements, so that blocks
    may differ in size, and no share exceeds ``cap`` or what the block's smallest points leave: the others then take
    over the rest in proportion. Inside a block ``uniform`` decides; what it cannot use passes on to the next block.

    Parameters
    ----------
    curves
        The matrices; those of one block carry the same influence.
    limit
        The largest Σ stored.
    temperature
        In units of the influence; MoDeGPT uses about 0.1 for models of 7 B. None for the mean influence of the
        blocks: influences of small models are several times those of large ones, and a fixed temperature would give
        nearly equal shares in one model, and all to a few blocks in another. With the mean, the shares depend on the
        ratios of the influences alone, and blocks that are much alike lose nearly the same.
    cap
        In (0, 1]: no block is asked to remove a larger share. Rounding to ranks may still add to it.

    Returns
    -------
    numpy.ndarray
        (len(curves),) int64: the index of the chosen point of each curve.

    Raises
    ------
    InputError
        If a curve has no influence, the temperature is not above 0, the cap lies outside (0, 1] or makes the limit
        unreachable, or even the smallest ranks exceed the limit.
    """
    if temperature is not None and not temperature > 0:
        raise InputError(f"The temperature must be above 0, got {temperature}. Leave it out for the default.")
    if not 0 < cap <= 1:
        raise InputError(f"The cap is the largest share to remove of a block and must lie in (0, 1], got {cap}.")
    influence = {curve.block: _influence(curve) for curve in curves}
    require_reachable(curves, limit)
    choice = np.zeros(len(curves), dtype=np.int64)
    members = [[p for p, curve in enumerate(curves) if curve.block == block] for block in sorted(influence)]
    blocks = [[curves[position] for position in positions] for positions in members]
    dense, room = _room(blocks, cap)
    smallest = [least_stored(block) for block in blocks]
    remove = max(int(dense.sum()) - limit, 0)
    if remove > room.sum():
        # Rounded down, so that the share named here can be reached.
        largest = math.floor(room.sum() / dense.sum() * 10**4) / 10**4
        raise InputError(
            f"{len(curves)} matrices cannot be stored in {limit} elements: with at most {cap} removed of each block, "
            f"the largest share of their {dense.sum()} elements that can go is {largest}. Raise --cap, or ask for a "
            "smaller --ratio."
        )
    scores = np.array([influence[block] for block in sorted(influence)])
    kept = np.cumsum(dense - removed_elements(scores, dense, room, remove, temperature))
    spent, reserved = 0, sum(smallest)
    for number, (positions, block) in enumerate(zip(members, blocks, strict=True)):
        reserved -= smallest[number]
        planned = limit if number == len(blocks) - 1 else round(kept[number])
        # What rounding does to a sum of real numbers must neither exceed the limit nor starve a block.
        allowed = max(min(planned, limit - reserved) - spent, smallest[number])
        choice[positions] = uniform.allocate(block, allowed)
        spent += stored_total(block, choice[positions])
    return choice


def least(curves: Sequence[Curve], *, cap: float = 1.0, **_: object) -> int:
    """Return the smallest limit that :func:`allocate` accepts with a cap."""
    blocks = [[curve for curve in curves if curve.block == block] for block in sorted({c.block for c in curves})]
    dense, room = _room(blocks, cap)
    return int(dense.sum() - room.sum())


def _room(blocks: Sequence[Sequence[Curve]], cap: float) -> tuple[np.ndarray, np.ndarray]:
    """Elements of each block, and how many of them may go, (blocks,) int64."""
    dense = np.array([sum(curve.dense for curve in block) for block in blocks], dtype=np.int64)
    smallest = np.array([least_stored(block) for block in blocks], dtype=np.int64)
    return dense, np.minimum(dense - smallest, np.ceil(cap * dense).astype(np.int64))


def removed_elements(
    influence: np.ndarray, dense: np.ndarray, room: np.ndarray, remove: int, temperature: float | None
) -> np.ndarray:
    """Divide ``remove`` ≤ Σ room elements among blocks: dense · c · exp(−influence / temperature), at most room each.

    Parameters
    ----------
    influence, dense, room
        (blocks,): scores, elements, and elements that may go.
    remove
        Σ of the result.
    temperature
        See :func:`allocate`.

    Returns
    -------
    numpy.ndarray
        (blocks,) float64.
    """
    unit = influence.sum() / max(len(influence), 1) if temperature is None else temperature
    # Without any influence (up to rounding it is not negative) all blocks are alike.
    exponent = influence / unit if unit > 0 else np.zeros(len(influence))
    removed = np.zeros(len(dense))
    free = np.ones(len(dense), dtype=bool)
    while free.any():
        # In proportion to the largest share that is still free, so that not all of them underflow.
        weight = dense[free] * np.exp(exponent[free].min() - exponent[free])
        removed[free] = max(remove - removed[~free].sum(), 0) * weight / weight.sum()
        full = free & (removed > room)
        if not full.any():
            break
        removed[full] = room[full]
        free &= ~full
    return removed


def _influence(curve: Curve) -> float:
    if curve.influence is None:
        raise InputError(
            f"The allocator 'block-influence' needs calibration data: the curve of {curve.name} has no block "
            "influence. Calibrate on a text, or use another allocator."
        )
    return curve.influence
