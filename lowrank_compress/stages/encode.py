"""One block's weights and bases to the tensors and config entries of its compressed modules."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowrank_compress.allocation.storage import cost, largest_rank
from lowrank_compress.arch.resolve import Target
from lowrank_compress.config import FactorizeConfig
from lowrank_compress.errors import InputError
from lowrank_compress.linalg.pivot import pivot
from lowrank_compress.linalg.weighted import Projector, factors
from lowrank_compress.model import weights
from lowrank_compress.model.blueprint import Blueprint
from lowrank_compress.model.surgery import Encoded, dense_part, module_entry, module_tensors
from lowrank_compress.stages.bases import projector_of
from lowrank_compress.stages.ranks import Choice


@dataclass(frozen=True)
class EncodedBlock:
    """One block of the compressed checkpoint.

    Attributes
    ----------
    tensors
        All tensors of the block, by their names on disk.
    modules
        `quantization_config.modules` entries of its compressed modules.
    """

    tensors: dict[str, Tensor]
    modules: dict[str, Any]


class Encoder:
    """Computes compressed blocks.

    Parameters
    ----------
    plan
        The dense checkpoint.
    config
        Storage, output dtype and device.
    """

    def __init__(self, plan: Blueprint, config: FactorizeConfig) -> None:
        self.plan, self.config = plan, config
        self.dtype: torch.dtype = getattr(torch, config.dtype)
        self.device = torch.device(config.device)

    def block(self, block: int, choices: Mapping[str, Choice], bases: Mapping[str, Tensor]) -> EncodedBlock:
        """Encode all claimed matrices of a block and take its other tensors along.

        Parameters
        ----------
        choices
            Format and rank of each matrix.
        bases
            The block's basis file.

        Raises
        ------
        InputError
            A rank is above what the score stage kept.
        """
        plan = self.plan
        tensors: dict[str, Tensor] = {}
        modules: dict[str, Any] = {}
        replaced: set[str] = set()
        for path, targets in plan.resolved.modules().items():
            chosen = [self._planned(target, choices[target.name]) for target in targets]
            if targets[0].block != block or all(choice.rank is None for choice in chosen):
                continue
            stored = plan.read(f"{path}.weight").to(self.device)
            bias = plan.read(f"{path}.bias").double() if targets[0].has_bias else None
            parts = []
            for target, choice in zip(targets, chosen, strict=True):
                if choice.rank is None:
                    parts.append(dense_part(stored, target).cast(self.dtype))
                    continue
                weight = weights.read(stored, target).double()
                part = self.encode(target, choice, weight, bases)
                if bias is not None and f"{target.name}/mean" in bases:
                    lost = weight.cpu() - part.rebuild()
                    restored = weights.bias(bias, target) + lost @ bases[f"{target.name}/mean"]
                    weights.place_bias(bias, target, restored)
                parts.append(part)
            modules[path] = module_entry(targets, parts)
            stem = plan.name_on_disk(f"{path}.weight").removesuffix("weight")
            tensors |= {stem + leaf: tensor for leaf, tensor in module_tensors(targets, parts, self.dtype).items()}
            if bias is not None:
                tensors[plan.name_on_disk(f"{path}.bias")] = bias.to(self.dtype)
            replaced |= {f"{path}.weight", f"{path}.bias"}
        for name in plan.inside(block):
            if name not in replaced:
                tensors[plan.name_on_disk(name)] = cast(plan.read(name), self.dtype)
        return EncodedBlock(tensors, modules)

    def _planned(self, target: Target, choice: Choice) -> Choice:
        """The choice in the storage asked for: what ranks.json says, or as much as fits its stored count."""
        storage = self.config.storage
        if choice.rank is None or storage == choice.format:
            return choice
        rank = min(largest_rank(storage, target.shape, choice.stored(target.shape)), min(target.shape) - 1)
        return Choice(storage, max(rank, 1))

    def encode(self, target: Target, choice: Choice, weight: Tensor, bases: Mapping[str, Tensor]) -> Encoded:
        """Factor one matrix.

        "auto" takes the format with the smaller metric loss after rounding, at equal stored count.

        Raises
        ------
        InputError
            The rank is above what the score stage kept.
        """
        assert choice.rank is not None
        projector = projector_of(bases, target)
        ranks = self._ranks(target, choice, projector)
        # Ranks are nested: the factors of a smaller one are leading parts of a larger one's.
        left, right = (factor.cpu() for factor in factors(weight, projector, max(ranks.values())))
        best, least = None, math.inf
        for form, rank in ranks.items():
            tail = float(projector.tail()[rank])
            if best is not None and tail >= least:
                continue
            pair = left[:, :rank], right[:rank]
            part = _encoded(form, *pair).cast(self.dtype)
            loss = tail + _rounding_loss(target, part, *pair, bases) if len(ranks) > 1 else tail
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
        ranks = {form: min(largest_rank(form, target.shape, count), largest) for form in ("pivot", "pair")}
        return {form: rank for form, rank in ranks.items() if rank > 0}


def _encoded(form: str, left: Tensor, right: Tensor) -> Encoded:
    """Store A B, A of shape (out, r) and B of shape (r, in), in a format."""
    if form == "pair":
        return Encoded("pair", len(right), right, left)
    found = pivot(left, right)
    return Encoded("pivot", len(right), found.pivots, found.coefficients, found.index)


def _rounding_loss(target: Target, part: Encoded, left: Tensor, right: Tensor, bases: Mapping[str, Tensor]) -> float:
    """Metric loss of rounding to the output dtype (see `methods.sensitivities`)."""
    error = part.rebuild() - left @ right
    return float(bases[f"{target.name}/out_sensitivity"] @ error.square() @ bases[f"{target.name}/in_sensitivity"])


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast a floating-point tensor; leave others."""
    return tensor.to(dtype) if tensor.is_floating_point() else tensor
