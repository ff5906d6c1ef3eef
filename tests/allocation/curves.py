"""Random curves for the tests of allocators."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from lowrank_compress.allocation.choice import of_ranks
from lowrank_compress.allocation.curve import Curve, make_curve
from lowrank_compress.formats.table import FORMATS, choices_of

STORAGES = sorted(FORMATS)


def ranked(name: str, stored: np.ndarray, loss: np.ndarray, **more: Any) -> Curve:
    """A curve of these points, at ranks 1, 2 … and dense."""
    return Curve(name, of_ranks("pair", np.arange(1, len(stored)), stored[:-1]), stored, loss, **more)


def factorized(
    name: str, shape: tuple[int, int], tail: np.ndarray, storage: str, spectrum: np.ndarray | None = None
) -> Curve:
    """The curve of a matrix whose best approximations lose this at rank 0, 1 …"""
    format, choices = FORMATS[storage], choices_of(FORMATS[storage], shape)
    ranks = np.array([format.rank(tuple(parameters)) for parameters in choices.parameters.tolist()], dtype=np.int64)
    choices = choices.where(ranks < len(tail))
    losses = format.losses(tail, choices.parameters)
    return make_curve(name, shape[0] * shape[1], choices, losses, spectrum=spectrum)


def random_curve(rng: np.random.Generator, storage: str, largest: int = 12, name: str = "w") -> Curve:
    shape = (int(rng.integers(4, largest)), int(rng.integers(4, largest)))
    spectrum = np.sort(rng.exponential(size=min(shape)) * rng.uniform(0.1, 3))[::-1]
    tail = np.append(np.cumsum(spectrum[::-1] ** 2)[::-1], 0.0)
    return factorized(name, shape, tail, storage, spectrum)


def random_curves(seed: int, count: int, storage: str, largest: int = 12) -> list[Curve]:
    """Curves of random matrices, two to a block."""
    rng = np.random.default_rng(seed)
    curves = [random_curve(rng, storage, largest, f"w{position}") for position in range(count)]
    influence = rng.uniform(0.02, 0.6, size=count)
    return [
        dataclasses.replace(curve, block=position // 2, influence=float(influence[position // 2]))
        for position, curve in enumerate(curves)
    ]


def some_limit(curves: list[Curve], share: float) -> int:
    """A limit between the cheapest points and everything dense."""
    least, most = sum(int(curve.stored[0]) for curve in curves), sum(curve.dense for curve in curves)
    return least + int(share * (most - least))
