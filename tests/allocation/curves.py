"""Random curves for the tests of allocators."""

from __future__ import annotations

import numpy as np

from lowrank_compress.allocation.curve import Curve, linear_curve
from lowrank_compress.allocation.storage import cost


def random_curve(rng: np.random.Generator, storage: str, largest: int = 12, name: str = "w") -> Curve:
    shape = (int(rng.integers(4, largest)), int(rng.integers(4, largest)))
    spectrum = np.sort(rng.exponential(size=min(shape)) * rng.uniform(0.1, 3))[::-1]
    tail = np.append(np.cumsum(spectrum[::-1] ** 2)[::-1], 0.0)
    return linear_curve(name, shape, tail, lambda ranks: cost(storage, shape, ranks), spectrum)


def random_curves(seed: int, count: int, storage: str, largest: int = 12) -> list[Curve]:
    rng = np.random.default_rng(seed)
    return [random_curve(rng, storage, largest, f"w{position}") for position in range(count)]


def some_limit(curves: list[Curve], share: float) -> int:
    """A limit between the cheapest points and everything dense."""
    least, most = sum(int(curve.stored[0]) for curve in curves), sum(curve.dense for curve in curves)
    return least + int(share * (most - least))
