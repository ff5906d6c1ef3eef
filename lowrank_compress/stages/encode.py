"""One block's weights and bases to the tensors and config entries of its compressed modules."""

from __future__ import annotations

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
        projector = projector_of(bases, target)
        assert choice.rank is not None
        if choice.format != "auto":
            return self._encode_as(choice.format, target, choice.rank, weight, projector)
        count = cost("auto", target.shape, choice.rank)
        candidates = []
        for form in ("pivot", "pair"):
            rank = min(largest_rank(form, target.shape, count), min(target.shape) - 1, projector.expand.shape[1])
            if rank > 0:
                part = self._encode_as(form, target, rank, weight, projector)
                candidates.append((self._loss(target, part, weight, projector, bases), part))
        return min(candidates, key=lambda candidate: candidate[0])[1]

    def _encode_as(self, form: str, target: Target, rank: int, weight: Tensor, projector: Projector) -> Encoded:
        largest = projector.expand.shape[1]
        if rank > largest:
            raise InputError(
                f"{target.name} asks for rank {rank}, but its basis was kept up to rank {largest}. Repeat `lrc score` "
                "with --allocate loss, which keeps every rank that can pay, or lower the rank in ranks.json."
            )
        left, right = (factor.cpu() for factor in factors(weight, projector, rank))
        if form == "pair":
            return Encoded("pair", rank, right, left).cast(self.dtype)
        found = pivot(left, right)
        return Encoded("pivot", rank, found.pivots, found.coefficients, found.index).cast(self.dtype)

    def _loss(
        self, target: Target, part: Encoded, weight: Tensor, projector: Projector, bases: Mapping[str, Tensor]
    ) -> float:
        """Metric loss of truncation, plus that of rounding to the output dtype (see `methods.sensitivities`)."""
        left, right = (factor.cpu() for factor in factors(weight, projector, part.rank))
        error = part.rebuild() - left @ right
        rounding = bases[f"{target.name}/out_sensitivity"] @ error.square() @ bases[f"{target.name}/in_sensitivity"]
        return float(projector.tail()[part.rank] + rounding)


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast a floating-point tensor; leave others."""
    return tensor.to(dtype) if tensor.is_floating_point() else tensor
