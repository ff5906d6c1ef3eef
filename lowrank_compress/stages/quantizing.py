"""Round every layer of a checkpoint that can be, block by block, and choose how many bits each is to have."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lowrank_compress.allocation.choice import of_ranks
from lowrank_compress.allocation.curve import Curve
from lowrank_compress.allocation.loss import allocate
from lowrank_compress.artifacts.tensors import BlockFiles
from lowrank_compress.calibration.capture import numbered
from lowrank_compress.calibration.layers import LayerMoments, layer_moments
from lowrank_compress.errors import InputError
from lowrank_compress.formats.packed import BITS, Packing, beside_bytes, packed_tensors, scale_dtype
from lowrank_compress.linalg.quantize import Quantized, Scales
from lowrank_compress.methods.rounding import ROUNDINGS, Problem
from lowrank_compress.model.skeleton import Skeleton
from lowrank_compress.resources.resources import Resources
from lowrank_compress.shipped.beside import Beside
from lowrank_compress.stages.fitting import Way, beside_of, fit
from lowrank_compress.stages.headbits import head_of, rounded_head
from lowrank_compress.stages.layers import Layer, layers_of
from lowrank_compress.stages.quantizeconfig import QuantizeConfig
from lowrank_compress.stages.reporting import Reporter
from lowrank_compress.stages.samples import calibration_batches
from lowrank_compress.stages.thin import made_up, thin_experts


class Quantizer:
    """Rounds layers, keeping each finished block on the disk.

    Parameters
    ----------
    config
        How.
    skeleton
        The checkpoint's model.
    claimed_bytes
        Of all claimed weights: as the original stores them, and as they are stored now.
    work, id
        Where finished blocks lie, and of which result they are.
    reporter, resources
        Told about progress; what may be used.
    """

    def __init__(
        self,
        config: QuantizeConfig,
        skeleton: Skeleton,
        claimed_bytes: tuple[int, int],
        work: Path,
        id: str,
        reporter: Reporter,
        resources: Resources,
    ) -> None:
        self.config, self.skeleton, self.plan = config, skeleton, skeleton.blueprint
        self.original_bytes, self.bytes_now = claimed_bytes
        self.reporter, self.resources = reporter, resources
        self.layers, self.left = layers_of(self.plan)
        if not self.layers:
            raise InputError(f"{self.plan.checkpoint.path} has no linear layer in its blocks that could be quantized.")
        self.rounding = ROUNDINGS[config.rounding]
        self.dtype = self.plan.checkpoint.dtype
        self.scales = scale_dtype(self.dtype)
        self.packing = Packing(config.group, config.symmetric, self.scales)
        self.bits = BITS if config.whole is None else (config.whole,)
        self.work = work
        self.rounded = BlockFiles(work, id, "rounded")
        self.blocks = range(len(self.plan.resolved.blocks))
        self.head = None if config.head is None else head_of(self.plan)
        if self.head is not None:
            self.left.pop(self.head.path)
        if config.whole is None:
            self._require_reachable()

    def of_block(self, block: int) -> list[Layer]:
        """The layers of a block."""
        return [layer for layer in self.layers if layer.block == block]

    def ways(self, layer: Layer) -> list[Way]:
        """How a layer may be rounded: where a product is counted, with one or without."""
        rank = min(self.config.residual_rank, *layer.shape)
        ranks = [0, rank] if rank and self.config.inside and self.config.whole is None else [rank]
        return [Way(bits, each) for bits in self.bits for each in ranks]

    def make(self) -> dict[str, Way]:
        """Round what is not rounded yet; return how each layer is by its path, none for one that stays."""
        missing = [block for block in self.scopes if not self.rounded.finished(block)]
        if missing:
            self.work.mkdir(parents=True, exist_ok=True)
            for block, moments in self._moments(missing):
                if block in self.blocks:
                    self._round(block, moments)
                else:
                    self._round_head(moments)
        head = {} if self.head is None else {self.head.path: self.way_of_head}
        return self._chosen() | head

    @property
    def scopes(self) -> range:
        """Numbers of the blocks, and of what is behind them if the head is rounded."""
        return range(len(self.blocks) + (self.head is not None))

    @property
    def all(self) -> list[Layer]:
        """The layers of the blocks, and the head if it is rounded."""
        return [*self.layers, *([] if self.head is None else [self.head])]

    def kept(self, block: int) -> dict[str, Tensor]:
        """Read what was rounded of a block; of −1, of what lies outside of all."""
        if block >= 0:
            return self.rounded.read(block)
        return {} if self.head is None else self.rounded.read(self.head.block)

    @property
    def way_of_head(self) -> Way:
        """How the head is rounded, if it is."""
        assert self.config.head is not None
        return Way(self.config.head)

    @property
    def head_bytes(self) -> int:
        """What the head takes in few bits; 0 where it stays as it is."""
        return 0 if self.head is None else self.bytes_of(self.head, self.way_of_head)

    def clear(self) -> None:
        """Remove what lies on the disk."""
        self.rounded.remove(self.scopes)

    def _moments(self, missing: Sequence[int]) -> Iterator[tuple[int, Mapping[str, LayerMoments]]]:
        if self.config.source is None:
            for block in missing:
                yield block, {}
                self.reporter.advance("quantize", block + 1, len(self.scopes))
            return
        yield from layer_moments(
            self.skeleton,
            numbered(calibration_batches(self.config, self.plan.checkpoint, self.plan.task)),
            [[layer.path for layer in self.of_block(block)] for block in self.blocks],
            gradients=self.rounding.needs == "gradients",
            single=self.config.aided,
            head=None if self.head is None else self.head.path,
            skip=lambda block: block not in missing,
            clip=self.config.clip,
            advance=self.reporter.advance,
            spill_to=self.work,
            resources=self.resources,
        )

    def _round(self, block: int, moments: Mapping[str, LayerMoments]) -> None:
        tensors: dict[str, Tensor] = {}
        losses: dict[str, dict[str, float]] = {}
        outliers: dict[str, int] = {}
        device = torch.device(self.config.device)
        thin = thin_experts(self.of_block(block), moments)
        given = {layer.expert: moments[layer.path].given for layer in self.of_block(block) if layer.path in moments}
        given = {expert: share for expert, share in given.items() if expert is not None}
        moments = made_up(self.of_block(block), moments, self.config)
        for layer in self.of_block(block):
            known = moments.get(layer.path)
            weight = self.plan.read(f"{layer.path}.weight").to(device, torch.float64)
            problem = Problem(
                weight.mT.contiguous() if layer.transposed else weight,
                self.scales,
                self.config.damping,
                self.config.damping_fisher,
                None if known is None else known.gram.to(device),
                None if known is None or known.fisher is None else known.fisher.to(device),
            )
            seen = None if known is None else known.seen
            for way in self.ways(layer):
                grid = self.packing.grid(layer.shape[1], way.bits)
                fitted = fit(self.config, problem, grid, way.rank, seen)
                losses.setdefault(layer.path, {})[way.key] = fitted.lost
                outliers[layer.path] = fitted.beside.outliers
                tensors |= {f"{layer.path}/{way.key}/{name}": each for name, each in fitted.kept(self.scales).items()}
        self.rounded.write(block, tensors, notes={"losses": losses, "outliers": outliers, "thin": thin, "given": given})

    def _round_head(self, moments: Mapping[str, LayerMoments]) -> None:
        layer, way = self.head, self.way_of_head
        assert layer is not None
        grid = self.packing.grid(layer.shape[1], way.bits)
        weight, known = self.plan.read(f"{layer.path}.weight"), moments.get(layer.path)
        kept, share = rounded_head(self.config, layer, grid, weight, known, self.scales)
        named = {f"{layer.path}/{way.key}/{name}": tensor for name, tensor in kept.items()}
        self.rounded.write(layer.block, named, notes={"share": share})

    def losses(self) -> dict[str, dict[str, float]]:
        """What each layer loses in each way, by its key (`Problem.lost`)."""
        return {path: each for block in self.blocks for path, each in self.rounded.notes(block)["losses"].items()}

    def thin(self) -> dict[str, int]:
        """The tokens of experts that saw few, by their paths (`thin_experts`)."""
        return {
            path: tokens for block in self.blocks for path, tokens in self.rounded.notes(block).get("thin", {}).items()
        }

    def _counts(self, layer: Layer) -> float:
        """What a loss of a layer counts beside those of others.

        Losses in nats compare. Shares of what a layer computes count as much as the router gives to its expert; where
        nothing was looked at, all experts of a block have as much as one layer that sees all.
        """
        if layer.expert is None or self.rounding.needs == "gradients":
            return 1.0
        return float(self.rounded.notes(layer.block)["given"].get(layer.expert, 1 / layer.experts))

    def tensors(self, layer: Layer, way: Way, block: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a layer by their leaf names; `block` is what was kept of its block."""
        codes, scale, zero = (block[f"{layer.path}/{way.key}/{name}"] for name in ("codes", "scale", "zero"))
        scales = Scales(self.packing.grid(layer.shape[1], way.bits), scale.double(), zero.double())
        more = {name: block[f"{layer.path}/{way.key}/{name}"] for name in self._named(layer, way)}
        return packed_tensors(Quantized(scales, codes), self.scales) | more

    def beside(self, layer: Layer, way: Way) -> Beside:
        """What a layer that is rounded has beside its codes; the head nothing."""
        if layer is self.head:
            return Beside()
        outliers = self.rounded.notes(layer.block)["outliers"][layer.path] if self.config.outliers else 0
        return beside_of(self.config, way.rank, outliers)

    def _named(self, layer: Layer, way: Way) -> list[str]:
        """The names of the tensors that a layer has beside its codes."""
        return list(self.beside(layer, way).buffers(*layer.shape, self.scales))

    def bytes_of(self, layer: Layer, way: Way | None) -> int:
        """Bytes of a layer's weight; None for as it is. Those of outliers are known once it is rounded."""
        if way is None:
            return layer.weights * self.dtype.itemsize
        beside = beside_bytes(layer.shape, self.beside(layer, way), self.scales)
        return self.packing.bytes(layer.shape, way.bits) + beside

    @property
    def other_bytes(self) -> int:
        """Bytes of what a budget counts beside the layers."""
        return self.bytes_now - sum(self.bytes_of(layer, None) for layer in self.layers) + self.head_bytes

    def _limit(self) -> int:
        """How many bytes the layers may take together."""
        config = self.config
        if config.bytes is None:
            return math.floor(Fraction(str(config.bits)) * sum(layer.weights for layer in self.layers) / 8)
        return math.floor(Fraction(str(config.bytes)) * self.original_bytes) - self.other_bytes

    def _require_reachable(self) -> None:
        least = sum(self.bytes_of(layer, Way(BITS[0])) for layer in self.layers)
        if least <= (limit := self._limit()):
            return
        if self.config.bytes is None:
            weights = sum(layer.weights for layer in self.layers)
            smallest = f"--bits {math.ceil(800 * least / weights) / 100}"
        else:
            lacking = (least - limit) / self.original_bytes
            smallest = f"--bytes {math.ceil(1e4 * (self.config.bytes + lacking)) / 1e4}"
        raise InputError(
            f"The budget is out of reach: with {BITS[0]} bits and scales for groups of {self.config.group} the layers "
            f"take {least:,} bytes, and {max(limit, 0):,} are theirs. The smallest budget is {smallest}; a larger "
            "--group needs less."
        )

    def _chosen(self) -> dict[str, Way]:
        if self.config.whole is not None:
            return {layer.path: way for layer in self.layers for way in self.ways(layer)}
        losses = self.losses()
        curves, kinds = [], []
        for layer in self.layers:
            counts, whole = self._counts(layer), self.bytes_of(layer, None)
            lost = {key: counts * loss for key, loss in losses[layer.path].items()}
            sizes = {way: size for way in self.ways(layer) if (size := self.bytes_of(layer, way)) < whole}
            # Of a narrow matrix several take the same words; and what a search misses, more of them may lose more.
            kind = list[Way]()
            for way in sorted(sizes, key=lambda way: (sizes[way], lost[way.key])):
                if not kind or lost[way.key] < lost[kind[-1].key]:
                    kind.append(way)
            stored = np.array([*(sizes[way] for way in kind), whole], dtype=np.int64)
            choices = of_ranks("packed", np.array([way.bits for way in kind], dtype=np.int64), stored[:-1])
            loss = np.array([*(lost[way.key] for way in kind), 0.0])
            curves.append(Curve(layer.path, choices, stored, loss, block=layer.block))
            kinds.append([*kind, None])
        points = allocate(curves, self._limit())
        found = {layer.path: kind[point] for layer, kind, point in zip(self.layers, kinds, points, strict=True)}
        return {path: way for path, way in found.items() if way is not None}
