"""One block's weights and bases to the tensors and config entries of its compressed modules."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lowrank_compress.allocation.storage import cost, largest_rank
from lowrank_compress.arch.resolve import Target
from lowrank_compress.arch.spec import Group, Role
from lowrank_compress.config import FactorizeConfig
from lowrank_compress.errors import InputError
from lowrank_compress.linalg.pivot import pivot
from lowrank_compress.linalg.weighted import Projector, factors
from lowrank_compress.methods.matrix_unit import MatrixUnit
from lowrank_compress.methods.module_unit import ModuleUnit
from lowrank_compress.methods.units import Unit
from lowrank_compress.model.blueprint import Blueprint
from lowrank_compress.model.casting import cast
from lowrank_compress.model.layers import INDEX_DTYPE
from lowrank_compress.model.surgery import (
    ROTARY,
    Encoded,
    attention_entry,
    joined,
    module_entry,
    module_tensors,
)
from lowrank_compress.stages.ranks import Choice


@dataclass
class EncodedBlock:
    """One block of the compressed checkpoint.

    Attributes
    ----------
    tensors
        All tensors of the block, by their names on disk.
    modules, dense_shapes, attention
        The block's entries of `layers.LowRankConfig`.
    choices
        How each unit is stored.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    modules: dict[str, Any] = field(default_factory=dict)
    dense_shapes: dict[str, list[int]] = field(default_factory=dict)
    attention: dict[str, Any] = field(default_factory=dict)
    choices: dict[str, Choice] = field(default_factory=dict)

    def notes(self) -> dict[str, Any]:
        """All but the tensors, as JSON."""
        return {
            "modules": self.modules,
            "dense_shapes": self.dense_shapes,
            "attention": self.attention,
            "choices": {name: [choice.format, choice.rank] for name, choice in self.choices.items()},
        }


@dataclass
class _Pieces:
    """What becomes of a block's matrices: those that change, the biases that change, and what heads keep."""

    parts: dict[str, Encoded] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)
    widths: dict[Group, int] = field(default_factory=dict)
    index: Tensor | None = None


class Encoder:
    """Computes compressed blocks.

    Parameters
    ----------
    plan
        The dense checkpoint.
    units
        What may be compressed.
    config
        Storage, output dtype and device.
    """

    def __init__(self, plan: Blueprint, units: Sequence[Unit], config: FactorizeConfig) -> None:
        self.plan, self.units, self.config = plan, units, config
        self.dtype: torch.dtype = getattr(torch, config.dtype)
        self.device = torch.device(config.device)
        # Products that are rounded to 16 bits afterwards lose nothing in single precision, and take half the time.
        self.precise = torch.float32 if self.dtype.itemsize == 2 else torch.float64

    def block(self, block: int, choices: Mapping[str, Choice], bases: Mapping[str, Tensor]) -> EncodedBlock:
        """Encode all units of a block and take its other tensors along.

        Parameters
        ----------
        choices
            Format and rank of each unit (see `ranks.in_storage`).
        bases
            The block's basis file.

        Raises
        ------
        InputError
            A rank is above what the score stage kept.
        """
        made, pieces = EncodedBlock(), _Pieces()
        for unit in self.units:
            if unit.block != block:
                continue
            choice = choices[unit.name]
            if choice.rank is None:
                made.choices[unit.name] = choice
            elif isinstance(unit, MatrixUnit):
                made.choices[unit.name] = self._matrix(unit, choice, bases, pieces)
            elif isinstance(unit, ModuleUnit):
                made.choices[unit.name] = self._module(unit, choice, bases, pieces)
        replaced = self._modules(block, pieces, made)
        self._attention(block, pieces, made)
        for name in self.plan.inside(block):
            if name not in replaced:
                made.tensors[self.plan.name_on_disk(name)] = cast(
                    self.plan.read(name), self.dtype, f"The tensor {name}"
                )
        return made

    def _matrix(self, unit: MatrixUnit, choice: Choice, bases: Mapping[str, Tensor], pieces: _Pieces) -> Choice:
        """Factor a matrix."""
        target = unit.target
        weight = self.plan.weight(target).to(self.device)
        part = self.encode(unit, choice, weight, bases)
        if f"{unit.name}/mean" in bases:
            lost = weight.cpu().double() - part.rebuild()
            pieces.biases[target.name] = self.plan.bias(target).double() + lost @ bases[f"{unit.name}/mean"]
        pieces.parts[target.name] = part
        return Choice(part.format, part.rank)

    def _module(self, unit: ModuleUnit, choice: Choice, bases: Mapping[str, Tensor], pieces: _Pieces) -> Choice:
        """Make a module narrower."""
        assert choice.rank is not None
        weights: dict[Role, Tensor] = {
            role: self.plan.weight(target).to(self.device).double() for role, target in unit.roles.items()
        }
        biases: dict[Role, Tensor] = {
            role: self.plan.bias(target).to(self.device).double()
            for role, target in unit.roles.items()
            if target.has_bias
        }
        stem = f"{unit.name}/"
        basis = {name.removeprefix(stem): t.to(self.device) for name, t in bases.items() if name.startswith(stem)}
        reduced = unit.method.reduce(unit.targets[0].heads, weights, biases, basis, choice.rank)
        for role, weight in reduced.weights.items():
            inner = cast(weight.cpu(), self.dtype, f"The smaller {unit.roles[role].name}")
            pieces.parts[unit.roles[role].name] = Encoded("dense", len(inner), inner)
        pieces.biases |= {unit.roles[role].name: bias.cpu() for role, bias in reduced.biases.items()}
        pieces.widths[unit.method.group] = choice.rank
        if reduced.index is not None:
            pieces.index = reduced.index.cpu()
        return choice

    def _modules(self, block: int, pieces: _Pieces, made: EncodedBlock) -> set[str]:
        """Put parts together to modules; return the names of the stock tensors that they replace."""
        plan = self.plan
        replaced: set[str] = set()
        for path, targets in plan.resolved.modules().items():
            first = targets[0]
            if first.block != block or not any(target.name in pieces.parts for target in targets):
                continue
            parts = [pieces.parts.get(target.name) or self._dense(target) for target in targets]
            stem = plan.name_on_disk(f"{path}.weight").removesuffix("weight")
            if all(part.format == "dense" for part in parts):
                weight = joined(targets, [part.inner for part in parts])
                # A fused gate and up lose rows of both.
                halves = [len(parts)] if first.role == "gate" and len(parts) > 1 else []
                made.dense_shapes[path] = [*weight.shape, *halves]
                made.tensors[f"{stem}weight"] = weight.T if first.conv1d else weight
            else:
                made.modules[path] = module_entry(targets, parts)
                if parts[0].shape[1] != first.shape[1] or made.modules[path]["out_features"] != first.rows.total:
                    made.dense_shapes[path] = [made.modules[path]["out_features"], parts[0].shape[1]]
                named = module_tensors(targets, parts, self.dtype)
                made.tensors |= {stem + leaf: tensor for leaf, tensor in named.items()}
            replaced.add(f"{path}.weight")
            if first.has_bias:
                biases = [pieces.biases.get(target.name, plan.bias(target).double()) for target in targets]
                made.tensors[plan.name_on_disk(f"{path}.bias")] = cast(
                    joined(targets, biases), self.dtype, f"The bias of {path}"
                )
                replaced.add(f"{path}.bias")
        return replaced

    def _dense(self, target: Target) -> Encoded:
        """Take a matrix as it is."""
        return Encoded("dense", target.shape[0], self.plan.weight(target)).cast(self.dtype, target.name)

    def _attention(self, block: int, pieces: _Pieces, made: EncodedBlock) -> None:
        """Describe an attention whose heads have become narrower."""
        heads, resolved = self.plan.resolved.heads, self.plan.resolved
        narrower = {group: width for group, width in pieces.widths.items() if group != "mlp"}
        if not narrower:
            return
        path = f"{resolved.blocks[block]}.{resolved.architecture.attention}"
        targets: dict[Role, Target] = {target.role: target for target in resolved.of_block(block)}
        query_key, value = narrower.get("qk", heads.size), narrower.get("vo", heads.size)
        made.attention[path] = attention_entry(targets, heads, query_key, value, rotary=pieces.index is not None)
        if pieces.index is not None:
            below = targets["q"].module.removeprefix(path) + ".weight"
            on_disk = self.plan.name_on_disk(f"{targets['q'].module}.weight").removesuffix(below)
            made.tensors[f"{on_disk}.{ROTARY}"] = pieces.index.to(INDEX_DTYPE)

    def encode(self, unit: MatrixUnit, choice: Choice, weight: Tensor, bases: Mapping[str, Tensor]) -> Encoded:
        """Factor one matrix.

        "auto" takes the format with the smaller metric loss after rounding, at equal stored count.

        Raises
        ------
        InputError
            The rank is above what the score stage kept.
        """
        assert choice.rank is not None
        projector = unit.projector(bases, self.precise)
        ranks = self._ranks(unit.target, choice, projector)
        # Ranks are nested: the factors of a smaller one are leading parts of a larger one's.
        left, right = (factor.cpu() for factor in factors(weight, projector, max(ranks.values())))
        best, least = None, math.inf
        for form, rank in ranks.items():
            tail = float(projector.tail()[rank])
            if best is not None and tail >= least:
                continue
            pair = left[:, :rank], right[:rank]
            part = _encoded(form, *pair).cast(self.dtype, unit.target.name)
            loss = tail + self._rounding_loss(unit.target, part, *pair, bases) if len(ranks) > 1 else tail
            if best is None or loss < least:
                best, least = part, loss
        assert best is not None
        return best

    def _ranks(self, target: Target, choice: Choice, projector: Projector) -> dict[str, int]:
        """Formats to try, and the rank of each at the choice's stored count."""
        kept = projector.expand.shape[1]
        assert choice.rank is not None
        if choice.rank > kept:
            raise InputError(
                f"{target.name} asks for rank {choice.rank}, but its basis was kept up to rank {kept}. Repeat `lrc "
                "score` with --allocate loss, which keeps every rank that can pay, or lower the rank in ranks.json."
            )
        if choice.format != "auto":
            return {choice.format: choice.rank}
        count = cost("auto", target.shape, choice.rank)
        largest = min(min(target.shape) - 1, kept)
        multiple = self.config.round_to if choice.rank % self.config.round_to == 0 else 1  # 1: edited by hand
        largest -= largest % multiple
        ranks = {form: min(largest_rank(form, target.shape, count, multiple), largest) for form in ("pivot", "pair")}
        return {form: rank for form, rank in ranks.items() if rank > 0}

    def _rounding_loss(
        self, target: Target, part: Encoded, left: Tensor, right: Tensor, bases: Mapping[str, Tensor]
    ) -> float:
        """Metric loss of rounding to the output dtype (see `methods.sensitivities`)."""
        error = part.rebuild(self.precise) - left @ right
        rows, columns = (bases[f"{target.name}/{side}_sensitivity"] for side in ("out", "in"))
        return float(rows @ (error.square_() @ columns.to(self.precise)).double())


def _encoded(form: str, left: Tensor, right: Tensor) -> Encoded:
    """Store A B, A of shape (out, r) and B of shape (r, in), in a format."""
    if form == "pair":
        return Encoded("pair", len(right), right, left)
    found = pivot(left, right)
    return Encoded("pivot", len(right), found.pivots, found.coefficients, found.index)
