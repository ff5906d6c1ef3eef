"""Proof, before any work, that attention with narrower heads computes what a family's own attention does."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lowrank_compress.arch.spec import Role
from lowrank_compress.arch.targets import Heads, Resolved, Target
from lowrank_compress.errors import UnsupportedError, first_line
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
# Under these names modules keep the number of their layer.
NUMBERS = ("layer_idx", "layer_index", "layer_id", "layer_number")
INSTEAD = "Give the attention a linear method, for instance --attention kfac."


@torch.no_grad()
def check_narrowing(skeleton: Skeleton, batch: Batch) -> None:
    """Run a block of each kind with its own attention, and with ours at full width and dimensions in another order.

    All get the hidden states that enter the first one: how a block maps them is compared, whichever they are.

    Raises
    ------
    UnsupportedError
        They differ: the family's attention does something that narrower heads would not. Or ours fails in the place of
        the family's.
    """
    architecture, config = skeleton.resolved.architecture, skeleton.model.config
    bounded = "it bounds queries, keys and values (clip_qkv)" if getattr(config, "clip_qkv", None) else ""
    if reason := architecture.whole or bounded:
        raise UnsupportedError(
            f"The attention of {architecture.name!r} cannot be computed as attention with narrower heads would be: "
            f"{reason}. {INSTEAD}"
        )
    replay = Replay(skeleton, [batch])
    (hidden,) = replay.start()
    for index in unlike_attentions(skeleton.model, skeleton.resolved):
        _check_block(skeleton, replay, index, hidden)


def _check_block(skeleton: Skeleton, replay: Replay, index: int, hidden: Tensor) -> None:
    resolved, size = skeleton.resolved, skeleton.resolved.heads.size
    architecture = resolved.architecture
    path = f"{resolved.blocks[index]}.{architecture.attention}"
    targets: dict[Role, Target] = {target.role: target for target in resolved.of_block(index)}
    rotary = resolved.heads.rotary > 0 and not architecture.head_norms
    entry = attention_entry(targets, resolved.heads, size, size, rotary=rotary, traits=architecture.traits)
    with skeleton.block(index) as block:
        expected = replay.step(index, block, 0, hidden)
        if rotary:
            _reorder(skeleton.model, targets, resolved)
        try:
            swap_modules(skeleton.model, LowRankConfig(attention={path: entry}))
            if rotary:
                order = _pairs(resolved.heads).expand(resolved.heads.key, -1).to(skeleton.device, INDEX_DTYPE)
                setattr(skeleton.model.get_submodule(path), ROTARY, order)
            found = replay.step(index, block, 0, hidden)
        except (MemoryError, torch.OutOfMemoryError):  # says nothing of the family
            raise
        except Exception as problem:  # whatever another family's attention runs into
            raise UnsupportedError(
                f"{path} of {type(skeleton.model).__name__} does not run as attention with narrower heads does "
                f"({type(problem).__name__}: {first_line(problem)}). {INSTEAD}"
            ) from problem
        finally:
            restore_modules(block)
    if not (found - expected).abs().max() <= TOLERANCE * (expected - hidden).abs().max():
        raise UnsupportedError(
            f"{path} of {type(skeleton.model).__name__} computes something else than attention with narrower heads "
            f"would: their outputs at full width differ. {INSTEAD}"
        )


def unlike_attentions(model: PreTrainedModel, resolved: Resolved) -> list[int]:
    """Return the first block of each kind: of those whose attentions have the same modules and settings.

    They may be unlike in the layer's type (its mask and rotary tables), or in what the modules from the block down to
    the attention and inside it have for attributes, but for the number of the layer.
    """
    kinds = getattr(model.config, "layer_types", None)
    kinds = kinds if isinstance(kinds, list | tuple) and len(kinds) == len(resolved.blocks) else None
    first: dict[object, int] = {}
    for index, prefix in enumerate(resolved.blocks):
        above = [prefix]
        for name in resolved.architecture.attention.split("."):
            above.append(f"{above[-1]}.{name}")
        modules = [(path.removeprefix(prefix), model.get_submodule(path)) for path in above]
        modules += list(model.get_submodule(above[-1]).named_modules())
        said = tuple((name, type(module), _settings(module)) for name, module in modules)
        first.setdefault((kinds and kinds[index], said), index)
    return list(first.values())


def _settings(module: nn.Module) -> tuple[tuple[str, str], ...]:
    """Return a module's attributes that are plain values, but for the number of its layer."""
    plain = {
        name: value for name, value in vars(module).items() if isinstance(value, bool | int | float | str | type(None))
    }
    return tuple(sorted((name, repr(value)) for name, value in plain.items() if name not in NUMBERS))


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
        if target.bias is not None:
            bias = module.get_parameter("bias").clone()
            weights.place_bias(bias, target, weights.bias(bias, target)[rows])
            module.bias = nn.Parameter(bias, requires_grad=False)
