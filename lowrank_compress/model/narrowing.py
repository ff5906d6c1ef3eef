"""Proof, before any work, that attention with narrower heads computes what a family's own attention does."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lowrank_compress.arch.resolve import Heads, Resolved, Target
from lowrank_compress.arch.spec import Role
from lowrank_compress.errors import UnsupportedError
from lowrank_compress.model import weights
from lowrank_compress.model.skeleton import Skeleton
from lowrank_compress.model.surgery import ROTARY, attention_entry
from lowrank_compress.model.walk.batch import Batch
from lowrank_compress.model.walk.replay import Replay
from lowrank_compress.shipped.config import LowRankConfig
from lowrank_compress.shipped.formats.base import INDEX_DTYPE
from lowrank_compress.shipped.restore import restore_modules
from lowrank_compress.shipped.swap import swap_modules

# Of the largest change that the block makes to a hidden state; float32 rounding is a hundredth of it.
TOLERANCE = 1e-4


@torch.no_grad()
def check_narrowing(skeleton: Skeleton, batch: Batch) -> None:
    """Run the first block with its own attention, and with ours at full width and dimensions in another order.

    Raises
    ------
    UnsupportedError
        They differ: the family's attention does something that narrower heads would not.
    """
    resolved = skeleton.resolved
    replay = Replay(skeleton, [batch])
    (hidden,) = replay.start()
    path = f"{resolved.blocks[0]}.{resolved.architecture.attention}"
    targets: dict[Role, Target] = {target.role: target for target in resolved.of_block(0)}
    rotary = resolved.heads.rotary > 0 and not resolved.architecture.head_norms
    entry = attention_entry(
        targets,
        resolved.heads,
        resolved.heads.size,
        resolved.heads.size,
        rotary=rotary,
        traits=resolved.architecture.traits,
    )
    with skeleton.block(0) as block:
        expected = replay.step(0, block, 0, hidden)
        if rotary:
            _reorder(skeleton.model, targets, resolved)
        try:
            swap_modules(skeleton.model, LowRankConfig(attention={path: entry}))
        except ValueError as problem:
            raise UnsupportedError(
                f"{problem}. Give the attention a linear method, for instance --attention kfac."
            ) from None
        if rotary:
            index = _pairs(resolved.heads).expand(resolved.heads.key, -1).to(skeleton.device, INDEX_DTYPE)
            setattr(skeleton.model.get_submodule(path), ROTARY, index)
        found = replay.step(0, block, 0, hidden)
        restore_modules(block)
    if not (found - expected).abs().max() <= TOLERANCE * (expected - hidden).abs().max():
        raise UnsupportedError(
            f"The attention of {type(skeleton.model).__name__} computes something else than attention with narrower "
            "heads would: their outputs at full width differ. Give it a linear method, for instance --attention kfac."
        )


def _pairs(heads: Heads) -> Tensor:
    """All dimensions of a head, (size,): first members of the rotary pairs, then their partners."""
    turned = torch.arange(heads.rotary).view(2, -1)
    return torch.cat([turned, torch.arange(heads.rotary, heads.size).view(-1, 2).T], 1).flatten()


def _reorder(model: nn.Module, targets: dict[Role, Target], resolved: Resolved) -> None:
    """Put the dimensions of every head of queries and keys in the order of `_pairs`."""
    order = _pairs(resolved.heads)
    for role in ("q", "k"):
        target = targets[role]
        module = model.get_submodule(target.module)
        rows = (torch.arange(target.shape[0]).view(-1, resolved.heads.size)[:, order]).flatten()
        weight = module.get_parameter("weight").clone()
        weights.place(weight, target, weights.read(weight, target)[rows])
        module.weight = nn.Parameter(weight, requires_grad=False)
        if target.has_bias:
            bias = module.get_parameter("bias").clone()
            weights.place_bias(bias, target, weights.bias(bias, target)[rows])
            module.bias = nn.Parameter(bias, requires_grad=False)
