"""The least work of a run of `lrc compress`, counted from shapes: operations, decompositions and bytes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from costs import eigh_unit, size_of

from lowrank_compress.allocation.choice import Choice
from lowrank_compress.artifacts.manifest import read_manifest
from lowrank_compress.calibration.capture import needs_gradient
from lowrank_compress.calibration.statistics import STATISTICS, statistic_key
from lowrank_compress.methods.groups import cheaper, needed
from lowrank_compress.methods.matrix_group import MatrixGroup
from lowrank_compress.methods.module_group import ModuleGroup
from lowrank_compress.model.blueprint import Blueprint
from lowrank_compress.resources.memory import free_memory
from lowrank_compress.stages.plan import Plan
from lowrank_compress.stages.ranks import RANKS, read_ranks
from lowrank_compress.stages.run import Run


class Work(NamedTuple):
    """A part of what a step must do; `unit` is what there is a rate for."""

    step: str
    what: str
    unit: str


class Floor:
    """The least work of a run, from shapes: operations, decompositions and bytes.

    A multiplication and an addition are two operations. Nothing is counted that another way of computing the same
    result would not need: second moments and products with triangles are half of a full product, and δ = g W of
    ``in_fisher`` is a part of the input's gradient anyway.

    Parameters
    ----------
    plan
        The recipe, with its groups and largest ranks.
    tokens
        Of the calibration set; 0 for methods without data.
    """

    def __init__(self, plan: Plan, tokens: int) -> None:
        self.plan, self.chooser, self.tokens = plan, plan.chooser, tokens
        self.blueprint: Blueprint = plan.subject.model
        self.wanted = needed(self.chooser.groups)
        self.gradient = needs_gradient(self.wanted)
        self.amounts: dict[Work, float] = {}
        self.eighs: set[tuple[int, int]] = set()

    def add(self, step: str, what: str, unit: str, amount: float) -> None:
        """Add work: operations in a precision, bytes read or written, or a number of decompositions."""
        if amount:
            work = Work(step, what, unit)
            self.amounts[work] = self.amounts.get(work, 0) + amount

    def eigh(self, step: str, size: int, keep: int, count: int = 1) -> None:
        """Add eigendecompositions."""
        self.eighs.add((size, keep))
        group = eigh_unit(size, keep)
        self.add(step, group.replace("eigh", "eigendecompositions of size"), group, count)

    def calibrate(self) -> None:
        """Sweeps over the blocks, the head's loss, and statistics, all in float32."""
        resolved = self.blueprint.resolved
        if not self.tokens:
            return
        matrices = sum(target.elements for target in resolved.targets)
        width = resolved.heads.query * resolved.heads.size
        products = 2 * matrices * self.tokens
        attention = 4 * self.tokens * self.plan.calibrate.seq_len * width * len(resolved.blocks)
        self.add("forward", "products with the weights", "float32", products)
        self.add("forward", "attention", "float32", attention)
        if self.gradient:
            config = self.blueprint.model.config
            logits = 2 * config.vocab_size * config.hidden_size * self.tokens
            self.add("loss", "logits and their gradient", "float32", 2 * logits)
            self.add("backward", "products with the weights, again", "float32", products)
            self.add("backward", "attention, again", "float32", attention)
            self.add("backward", "gradients of inputs", "float32", products)
            self.add("backward", "gradient of attention", "float32", 2 * attention)
        seen = set()
        for target in resolved.targets:
            for name in self.wanted.get(target.name, ()):
                key = (target.block, statistic_key(target, name))
                if key not in seen:
                    seen.add(key)
                    (m, n), length = target.shape, self.plan.calibrate.seq_len
                    each = min(2 * length * (m + n), 2 * m * n) if name == "row_fisher" else None
                    amount = self.tokens * (each or STATISTICS[name].elements(target))
                    self.add("backward" if self.gradient else "forward", "statistics", "float32", amount)

    def decompose(self) -> None:
        """Bases of all groups, in float64."""
        for group in self.chooser.groups:
            if isinstance(group, MatrixGroup):
                self._decompose_matrix(group, self.chooser.keep[group.name])
            elif isinstance(group, ModuleGroup) and group.method.group.name == "mlp":
                self._decompose_mlp(group)
            elif isinstance(group, ModuleGroup) and group.method.group.name == "vo":
                self._decompose_values(group)
        if self.chooser.allocator.needs_spectrum:
            for group in self.chooser.groups:
                k, far = min(group.shape), max(group.shape)
                self.add("score", "products with the metrics", "float64", far * k**2)
                self.eigh("score", k, k)

    def _decompose_matrix(self, group: MatrixGroup, keep: int) -> None:
        k, far_size = min(group.shape), max(group.shape)
        near, far = group.method.sides(group.target)
        if not far.far or far.diagonal:
            self.add("decompose", "products with the metrics", "float64", far_size * k**2)
        self.eigh("decompose", k, keep)
        if near.near and not near.diagonal:
            self.add("decompose", "Cholesky factors", "float64", k**3 / 3)
            self.add("decompose", "products with the metrics", "float64", 2 * k**3)
            self.add("decompose", "projectors", "float64", 2 * k**2 * keep)

    def _decompose_mlp(self, group: ModuleGroup) -> None:
        """Two Cholesky factors, an inverse and the images under the root; the order of the groups by elimination."""
        m, n = group.roles["down"].shape
        self.add("decompose", "Cholesky factors", "float64", 2 * n**3 / 3)
        self.add("decompose", "inverses", "float64", 2 * n**3 / 3)
        self.add("decompose", "losses of narrower MLPs", "float64", m * n**2)
        if group.method.fisher:
            self.add("decompose", "losses of narrower MLPs", "float64", 2 * m**2 * n)
            # Each group that goes changes the weights, their measured images and the inverse, over those that are left.
            self.add("decompose", "elimination of hidden units", "float64", 2 * m * n**2 + 2 * n**3 / 3)
            self.add("decompose", "elimination of hidden units", "float64", 2 * m**2 * n)

    def _decompose_values(self, group: ModuleGroup) -> None:
        heads = self.blueprint.resolved.heads
        outputs = group.roles["o"].elements
        if not group.method.fisher:
            self.add("decompose", "products with the metrics", "float64", outputs * heads.size)
        self.add("decompose", "products with the metrics", "float64", 2 * heads.key * heads.size**3)
        scaling = 2 * heads.size * (outputs + group.roles["v"].elements)
        self.add("decompose", "projectors", "float64", 2 * heads.key * heads.size**3 + scaling)
        self.eigh("decompose", heads.size, heads.size, heads.key)

    def factorize(self, choices: Mapping[str, Choice]) -> None:
        """Factors at the chosen ranks."""
        for group in self.chooser.groups:
            choice = choices.get(group.name)
            if choice is None or choice.is_dense:
                continue
            if isinstance(group, MatrixGroup):
                self._factorize_matrix(group, choice)
            elif isinstance(group, ModuleGroup) and group.method.group.name == "mlp":
                (m, n), width = group.roles["down"].shape, choice.parameters[0]
                down = 2 * m * (n - width) * width + m * width**2
                self.add("factorize", "weights of narrower modules", "float64", down)
            elif isinstance(group, ModuleGroup) and group.method.group.name == "vo":
                both = sum(target.elements for target in group.targets)
                self.add("factorize", "weights of narrower modules", "float64", 2 * choice.parameters[0] * both)

    def _factorize_matrix(self, group: MatrixGroup, choice: Choice) -> None:
        """The factors; pivot rows of them; where both formats are tried, what rounding does to each.

        Products that are rounded to 16 bits are in float32.
        """
        precision = "float32" if getattr(torch, self.plan.factorize.dtype).itemsize == 2 else "float64"
        m, n = group.shape
        stored = group.price(choice).elements
        formats = ("pair", "pivot") if choice.format == "auto" else (choice.format,)
        found = {form: cheaper(group, form, stored) for form in formats}
        ranks = {form: group.keep(best) for form, best in found.items() if best is not None}
        self.add("factorize", "factors", precision, 2 * max(ranks.values()) * m * n)
        if "pivot" in ranks:
            r = ranks["pivot"]
            # Two QR decompositions, the coefficients and the rows.
            self.add("factorize", "pivots", "float64", 2 * n * r**2 + 2 * m * r**2 + (m - r) * r**2 + 2 * n * r**2)
        if len(ranks) > 1:
            tried = sum(ranks.values())
            self.add("factorize", "rounding losses of both formats", precision, 4 * m * n * tried)

    def transfer(self, run: Run) -> None:
        """Bytes: the checkpoint, from the disk once, or once a sweep if the memory cannot hold it; what is kept."""
        size = sum(path.stat().st_size for path in set(self.plan.checkpoint.files.values()))
        first = ("forward", "backward") if self.gradient else ("forward",) if self.tokens else ("decompose",)
        cached = size < free_memory() // 2
        for step in first[:1] if cached else (*first, "factorize"):
            self.add(step, "the checkpoint", "read", size)
        self.add("decompose", "bases", "write", size_of(run.scores))
        self.add("write", "the compressed checkpoint", "write", size_of(run.model))

    def seconds(self, rates: Mapping[str, float]) -> dict[Work, float]:
        """Least seconds of each part."""
        return {work: amount / rates[work.unit] for work, amount in self.amounts.items()}


def work_of(plan: Plan, run: Run) -> Floor:
    """Count the work of a finished run."""
    calibrated = read_manifest(run.statistics)
    floor = Floor(plan, calibrated.report["tokens"] if calibrated else 0)
    floor.calibrate()
    floor.decompose()
    floor.factorize(read_ranks(run.scores / RANKS, plan.subject.candidates))
    floor.transfer(run)
    return floor
