"""How many of the windows of a calibration set each of several texts gives."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def shares(weights: Sequence[float], total: int) -> list[int]:
    """Part a number in proportion to weights; the parts add up to it.

    Each gets the whole part of its share; what is left over goes to the largest fractions, of equal ones to the first
    (the method of largest remainders).

    Parameters
    ----------
    weights
        Above 0.
    """
    exact = np.array(weights, np.float64) / np.sum(np.array(weights, np.float64)) * total
    found = np.floor(exact + 1e-9).astype(np.int64)
    order = np.argsort(found - exact, kind="stable")
    found[order[: total - int(found.sum())]] += 1
    return found.tolist()


def most(weights: Sequence[float], there: Sequence[int]) -> list[int]:
    """Return the largest numbers in proportion to weights of which none is more than there are.

    Parameters
    ----------
    weights
        Above 0.
    there
        How many there are of each.
    """
    unit = min(count / weight for weight, count in zip(weights, there, strict=True))
    return [math.floor(unit * weight + 1e-9) for weight in weights]
