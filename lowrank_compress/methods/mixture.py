"""Mixtures: a method for each part of a block under one name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lowrank_compress.config import ModuleMetric


@dataclass(frozen=True)
class Mixture:
    """Methods for the parts of a block that go together.

    Attributes
    ----------
    methods
        Group of matrices -> name of its method; or of alternatives, a linear and a module method with a bar between
        them. Other groups stay dense.
    allocate, storage
        What it uses where nothing else is asked for.
    metric
        Of its module methods.
    held_out
        Where the calibration set has few tokens, losses are taken on other text than fits are made on.
    drawn
        For so many windows of a language model's text one window of random tokens is added to the calibration set,
        where that is so small that it would specialise the model; 0 for none.
    rival
        A mixture, at its own settings, that whole plans of this one are held against where much is removed.
    instead_of_qk
        The linear method for queries and keys where an architecture forbids to make their heads narrower.
    """

    name: str
    methods: Mapping[str, str]
    paper: str
    help: str
    allocate: str = "uniform"
    storage: str = "pair"
    metric: ModuleMetric = "gram"
    held_out: bool = False
    drawn: int = 0
    rival: str | None = None
    instead_of_qk: str = "svd-llm"

    @property
    def metrics(self) -> str:
        """Its parts, for `lrc list methods`."""
        return " · ".join(f"{group}: {method}" for group, method in self.methods.items())
