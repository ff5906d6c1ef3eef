"""What a compressed checkpoint stands for, whatever way it is stored: its weights, multiplied out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from lowrank_compress.arch.targets import Target
from lowrank_compress.model import weights
from lowrank_compress.model.checkpoint import Checkpoint
from lowrank_compress.model.skeleton import Skeleton
from lowrank_compress.model.walk.walk import Walk
from lowrank_compress.shipped.attention import CompressedAttention
from lowrank_compress.shipped.latent import LatentAttention
from lowrank_compress.shipped.restore import restore_modules


def reconstruction(checkpoint: Checkpoint) -> Iterator[tuple[str, Iterable[Tensor]]]:
    """Yield the name and the tensor, in pieces, of everything that the checkpoint computes with.

    The factors of a matrix may be turned by any invertible matrix between them without a change to the product, and so
    may the values and the output of a head that has fewer dimensions than stock. Therefore a compressed matrix comes as
    its product Ŵ (out, in), and narrower values and output come as the product of both, head by head, with the values'
    bias as a further column. What is narrower than stock is padded with zeros. Where an attention keeps a window of
    exact keys and values, what it rebuilds the others by comes besides. One block is in memory at a time, in at least
    float32.

    Parameters
    ----------
    checkpoint
        A compressed checkpoint; of a dense one its own tensors come, fused ones in parts.
    """
    skeleton = Skeleton(checkpoint, torch.device("cpu"), torch.promote_types(checkpoint.dtype, torch.float32))
    plan = skeleton.blueprint
    restored = skeleton.restored_outside()
    factored = tuple(f"{name.rpartition('.')[0]}." for name in restored)
    yield from ((name, [plan.read(name)]) for name in plan.outside() if not name.startswith(factored))
    yield from ((name, [tensor]) for name, tensor in restored.items())
    for step in Walk([skeleton]).forwards():
        (block,), prefix = step.blocks, plan.resolved.blocks[step.index]
        narrow = any(
            isinstance(module, CompressedAttention) and module.lr_heads.value < module.lr_heads.size
            for module in block.modules()
        )
        remembered = {
            f"{prefix}.{name}": module.products()
            for name, module in block.named_modules()
            if isinstance(module, LatentAttention) and module.lr_remembered.window
        }
        restore_modules(block)
        yield from ((f"{name}:key-value", products) for name, products in remembered.items())
        state = {f"{prefix}.{leaf}": tensor for leaf, tensor in block.state_dict().items()}
        yield from _block(plan.resolved.of_block(step.index), state, narrow)


def _block(
    targets: Iterable[Target], state: Mapping[str, Tensor], narrow: bool
) -> Iterator[tuple[str, Iterable[Tensor]]]:
    targets = list(targets)
    claimed = {name for target in targets for name in (target.parameter, target.bias)}
    yield from ((name, [tensor]) for name, tensor in state.items() if name not in claimed)
    for target in targets:
        joined = narrow and target.role in ("v", "o")
        if not joined:
            yield target.name, [weights.read(state[target.parameter], target)]
        if target.bias is not None and not (joined and target.role == "v"):
            yield f"{target.name}.bias", [weights.bias(state[target.bias], target)]
    if narrow:
        value, output = (next(target for target in targets if target.role == role) for role in "vo")
        yield f"{value.name} · {output.name}", _products(value, output, state)


def _products(value: Target, output: Target, state: Mapping[str, Tensor]) -> Iterator[Tensor]:
    """Yield for each head its output times its values (and their bias): (hidden, hidden) or one column more."""
    assert value.heads is not None
    heads = value.heads
    right = weights.read(state[value.parameter], value).double()
    if value.bias is not None:
        right = torch.cat([right, weights.bias(state[value.bias], value).double()[:, None]], 1)
    left = weights.read(state[output.parameter], output).double()
    for head, columns in enumerate(left.split(heads.size, 1)):
        yield columns @ right.split(heads.size)[head // (heads.query // heads.key)]
