"""What the attentions of a compressed checkpoint may cache instead of keys and values: seen, decomposed, chosen.

Keys and values may be factored, narrower or as they were: of each block the matrices count that the checkpoint computes
with, in the metric of the compressed model itself. Where both are factored a latent as wide as both ranks together
loses nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from lowrank_compress.allocation.choice import Choice
from lowrank_compress.allocation.curve import make_curve
from lowrank_compress.allocation.loss import allocate
from lowrank_compress.arch.targets import Target
from lowrank_compress.artifacts.tensors import BlockFiles
from lowrank_compress.calibration.capture import half_of, numbered
from lowrank_compress.calibration.layers import LayerMoments, layer_moments
from lowrank_compress.calibration.statistics import HALVES, enough_tokens, first_half, statistic_key
from lowrank_compress.errors import InputError, UnsupportedError
from lowrank_compress.methods.candidates import key_value_group
from lowrank_compress.methods.latent import LatentGroup
from lowrank_compress.methods.linear import Damping
from lowrank_compress.model.blueprint import Blueprint
from lowrank_compress.model.remembering import check_remembering, require_cacheable
from lowrank_compress.model.skeleton import Skeleton
from lowrank_compress.model.walk.batch import Batch
from lowrank_compress.resources.resources import Resources
from lowrank_compress.shipped.attention import CompressedAttention
from lowrank_compress.shipped.latent import LatentAttention
from lowrank_compress.shipped.linear import CompressedLinear
from lowrank_compress.stages.cachebudget import most_kept, require_reachable
from lowrank_compress.stages.cacheconfig import CacheConfig
from lowrank_compress.stages.curves import predicted_losses
from lowrank_compress.stages.reporting import Reporter
from lowrank_compress.stages.samples import calibration_batches


@dataclass(frozen=True, eq=False)
class Block:
    """The attention of a block, its tensors in memory in float64.

    Attributes
    ----------
    path
        Of the attention.
    attention
        The module, as it is in the checkpoint.
    """

    path: str
    attention: nn.Module

    def module(self, target: Target) -> nn.Module:
        """Return the module that a target's rows belong to."""
        return self.attention.get_submodule(target.module.removeprefix(f"{self.path}."))

    def rows(self, target: Target) -> Tensor:
        """Return which rows of its module are those of a target that the checkpoint has kept: int64, increasing."""
        stock = torch.arange(target.view.rows.total)
        if isinstance(self.attention, CompressedAttention):
            stock = self.attention.stock_rows()[target.module.removeprefix(f"{self.path}.")]
        return torch.isin(stock, target.view.rows.index()).nonzero().flatten()

    def weight(self, target: Target) -> Tensor:
        """Return the matrix (rows, in) that the checkpoint computes with in the place of a target, float64."""
        module = self.module(target)
        if isinstance(module, CompressedLinear):
            weight = module.dense_weight()
        else:
            weight = module.get_parameter("weight")
            weight = weight.T if target.view.transposed else weight
        return weight[self.rows(target)]


class Latents:
    """Finds what the blocks of a checkpoint are to cache.

    Raises
    ------
    LrcError
        Its attentions cannot cache latents, or do so already; the cache is as small as asked, or cannot be.
    """

    def __init__(
        self, config: CacheConfig, plan: Blueprint, work: Path, id: str, reporter: Reporter, resources: Resources
    ) -> None:
        self.config, self.plan, self.reporter, self.resources = config, plan, reporter, resources
        self.work, self.bases = work, BlockFiles(work, id, "latents")
        self.blocks = range(len(plan.resolved.blocks))
        self._require()

    def _require(self) -> None:
        paths = [self.path(block) for block in self.blocks]
        for path in paths if self.plan.task == "lm" else ():
            if isinstance(self.plan.model.get_submodule(path), LatentAttention):
                raise UnsupportedError(
                    f"The cache of {path} keeps latents already. Name the checkpoint from before that was, or compress "
                    "the dense model again with another --kv-ratio."
                )
        require_cacheable(self.plan)
        now = sum(group.cached for group in self.groups)
        if now <= most_kept(self.config.kv_ratio, self.stock):
            raise InputError(
                f"The cache keeps {now} numbers of a token already, of the {self.stock} of the dense model, which is "
                f"no more than --kv-ratio {self.config.kv_ratio} allows. Ask for a larger one."
            )
        require_reachable(self.config.kv_ratio, self.config.round_to, self.groups, self.stock)

    def path(self, block: int) -> str:
        """Return the path of a block's attention."""
        return f"{self.plan.resolved.blocks[block]}.{self.plan.resolved.architecture.attention}"

    @property
    def stock(self) -> int:
        """Numbers of a token in the cache of the dense model."""
        heads = self.plan.resolved.heads
        return 2 * heads.key * heads.size * len(self.blocks)

    @cached_property
    def groups(self) -> tuple[LatentGroup, ...]:
        """What each block may cache; keys and values as narrow as their heads are."""
        heads, found = self.plan.resolved.heads, []
        for block in self.blocks:
            group = key_value_group(self.plan.resolved, block, self.config.kv_window)
            attention = self.plan.model.get_submodule(self.path(block))
            widths = [heads.size, heads.size]
            if isinstance(attention, CompressedAttention):
                widths = [attention.lr_heads.query_key, attention.lr_heads.value]
            key, value = (
                replace(target, shape=(heads.key * width, target.shape[1]))
                for target, width in zip(group.targets, widths, strict=True)
            )
            found.append(replace(group, targets=(key, value)))
        return tuple(found)

    def block(self, block: int) -> Block:
        """Read the attention of a block."""
        path = self.path(block)
        attention = copy.deepcopy(self.plan.model.get_submodule(path))
        state = {leaf: self.plan.read(f"{path}.{leaf}") for leaf in attention.state_dict()}
        precise = {leaf: tensor.double() if tensor.is_floating_point() else tensor for leaf, tensor in state.items()}
        attention.load_state_dict(precise, assign=True)
        return Block(path, attention.requires_grad_(False))

    def choose(self) -> tuple[dict[str, Choice], dict[str, float]]:
        """Choose what each block caches, by the least predicted loss; and say what that is of each, in nats."""
        self._decompose()
        curves = []
        for group in self.groups:
            choices, basis = group.choices(group.formats[0], self.config.round_to), self.bases.read(group.block)
            losses = predicted_losses(group, basis, choices, nats=True)
            choices = choices.where(slice(len(losses)))
            curves.append(make_curve(group.name, group.cached, choices, losses, block=group.block))
        points = list(zip(curves, allocate(curves, most_kept(self.config.kv_ratio, self.stock)), strict=True))
        chosen = {curve.name: curve.choice(point) for curve, point in points}
        return chosen, {curve.name: float(curve.loss[point]) for curve, point in points}

    def _decompose(self) -> None:
        """Make the basis of every block that has none yet."""
        missing = [block for block in self.blocks if not self.bases.finished(block)]
        if not missing:
            return
        config, checkpoint = self.config, self.plan.checkpoint
        batches = numbered(calibration_batches(config, checkpoint, self.plan.task))
        device = torch.device(config.device)
        check_remembering(Skeleton(checkpoint, device, torch.float32), batches[0])
        self.work.mkdir(parents=True, exist_ok=True)
        tokens = sum(batch.tokens for batch in batches)
        sizes = [size for group in self.groups for target in group.targets for size in target.shape]
        halved = tokens < enough_tokens(max(sizes)) and sum(len(batch.ids) for batch in batches) > 1
        parts = [[half_of(batch, half) for batch in batches] for half in (0, 1)] if halved else [batches]
        parts = [[batch for batch in part if len(batch.ids)] for part in parts]
        shares = [sum(batch.tokens for batch in part) / tokens for part in parts]
        for seen in zip(*(self._seen(part, missing) for part in parts), strict=True):
            block = seen[0][0]
            group, found = self.groups[block], self.block(block)
            means = self._means(group, found, [moments for _, moments in seen], shares)
            damping = Damping(config.damping_fisher, config.damping_gram)
            keep = int(group.choices(group.formats[0])[-1].parameters[0])
            self.bases.write(block, group.decompose(found.weight, means, damping, keep))

    def _seen(self, batches: Sequence[Batch], blocks: Sequence[int]) -> Iterator[tuple[int, dict[str, LayerMoments]]]:
        """Take what keys and values read, and the gradients at their outputs."""
        layers = [list(dict.fromkeys(target.module for target in group.targets)) for group in self.groups]
        return layer_moments(
            Skeleton(self.plan.checkpoint, torch.device(self.config.device), torch.float32),
            batches,
            layers,
            gradients=True,
            skip=lambda block: block not in blocks,
            clip=self.config.clip,
            advance=self.reporter.advance,
            spill_to=self.work,
            resources=self.resources,
        )

    def _means(
        self,
        group: LatentGroup,
        found: Block,
        seen: Sequence[Mapping[str, LayerMoments]],
        shares: Sequence[float],
    ) -> dict[str, Tensor]:
        """Name moments as `LatentGroup` takes them: means over all of the text, and over its first half if halved."""
        parts = []
        for moments in seen:
            part = {statistic_key(group.targets[0], "in_gram"): moments[group.targets[0].module].gram}
            for target in group.targets:
                rows, fisher = found.rows(target), moments[target.module].fisher
                assert fisher is not None
                part[statistic_key(target, "out_fisher")] = fisher[rows][:, rows]
            parts.append(part)
        means = {
            key: sum((share * part[key] for share, part in zip(shares, parts, strict=True)), torch.zeros(()).double())
            for key in parts[0]
        }
        if len(parts) > 1:
            means |= {first_half(key): mean for key, mean in parts[0].items()}
            means[HALVES] = torch.tensor([shares[0], shares[0]], dtype=torch.float64)
        return means

    def clear(self) -> None:
        """Remove what was kept meanwhile."""
        self.bases.remove(self.blocks)
