"""Which models may cache latents, and the proof, before any work, that attention which does computes the same."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lowrank_compress.arch.spec import Role
from lowrank_compress.arch.targets import Target
from lowrank_compress.errors import UnsupportedError, first_line
from lowrank_compress.model import weights
from lowrank_compress.model.blueprint import Blueprint
from lowrank_compress.model.narrowing import TOLERANCE, unlike_attentions
from lowrank_compress.model.skeleton import Skeleton
from lowrank_compress.model.surgery import attention_entry
from lowrank_compress.model.walk.batch import Batch
from lowrank_compress.model.walk.replay import Replay
from lowrank_compress.shipped.config import LowRankConfig
from lowrank_compress.shipped.restore import restore_modules
from lowrank_compress.shipped.swap import latent_problem, swap_modules, turning_of

INSTEAD = "Leave --kv-ratio out: the cache stays as it is."
# Exact positions, where a window is proved; the prompt is longer.
WINDOW = 4


def require_cacheable(design: Blueprint) -> None:
    """Refuse a model whose cache cannot keep latents, from its configuration.

    Raises
    ------
    UnsupportedError
        The message says why.
    """
    model, resolved = design.model, design.resolved
    if design.task != "lm":
        raise UnsupportedError(
            f"--kv-ratio makes the key-value cache of language models smaller; a {type(model).__name__} generates "
            f"nothing and has none. {INSTEAD}"
        )
    turning = turning_of(model)
    for index, path in enumerate(resolved.blocks):
        module = model.get_submodule(f"{path}.{resolved.architecture.attention}")
        roles = [target.role for target in resolved.of_block(index)]
        if resolved.architecture.latent or roles.count("k") != 1 or roles.count("v") != 1:
            problem = "it has no matrices for keys and for values, or caches a latent of its own already"
        else:
            problem = latent_problem(module, resolved.architecture.traits, turning)
        if problem:
            raise UnsupportedError(
                f"The attention of {resolved.architecture.name!r} at {path} cannot cache a latent: {problem}. {INSTEAD}"
            )


@torch.no_grad()
def check_remembering(skeleton: Skeleton, batch: Batch) -> None:
    """Run a block of each kind with its own attention, and with ours, whose factors multiply to the same matrices.

    Once all keys and values are rebuilt, once those of a window are exact. Of a compressed model blocks are made dense
    for it, after which the skeleton is of no more use.

    Raises
    ------
    UnsupportedError
        They differ: the family's attention does something that ours does not. Or ours fails in the place of it.
    """
    replay = Replay(skeleton, [batch])
    (hidden,) = replay.start()
    for index in unlike_attentions(skeleton.model, skeleton.resolved):
        with skeleton.block(index) as block:
            restore_modules(block)
            expected = replay.step(index, block, 0, hidden)
            for window in (WINDOW, 0):  # after the latter keys and values are no longer what they were
                found = _remembered(skeleton, replay, index, block, hidden, window)
                _compare(skeleton, index, hidden, expected, found)


def _path(skeleton: Skeleton, index: int) -> str:
    return f"{skeleton.resolved.blocks[index]}.{skeleton.resolved.architecture.attention}"


def _remembered(
    skeleton: Skeleton, replay: Replay, index: int, block: nn.Module, hidden: Tensor, window: int
) -> Tensor:
    """Run a stock block with our attention, and put the stock one back."""
    resolved, path = skeleton.resolved, _path(skeleton, index)
    architecture, heads = resolved.architecture, resolved.heads
    targets: dict[Role, Target] = {target.role: target for target in resolved.of_block(index)}
    entry = attention_entry(targets, heads, heads.size, heads.size, rotary=False, traits=architecture.traits)
    matrix = _keys_and_values(skeleton.model, targets)
    rank = min(matrix.shape)
    whole = torch.eye(rank).to(matrix)
    inner, outer = (whole, matrix) if rank == matrix.shape[1] else (matrix, whole)
    latent = {"rank": rank, "window": window}
    try:
        swap_modules(skeleton.model, LowRankConfig(attention={path: {**entry, "latent": latent}}))
        attention = skeleton.model.get_submodule(path)
        for name, factor in (("lr_latent", inner), ("lr_rebuild", outer)):
            linear = attention.get_submodule(name)
            linear.weight = nn.Parameter(factor, requires_grad=False)
        return replay.step(index, block, 0, hidden)
    except (MemoryError, torch.OutOfMemoryError):  # says nothing of the family
        raise
    except Exception as problem:  # whatever another family's attention runs into
        raise UnsupportedError(
            f"{path} of {type(skeleton.model).__name__} does not run as attention that caches a latent does "
            f"({type(problem).__name__}: {first_line(problem)}). {INSTEAD}"
        ) from problem
    finally:
        restore_modules(block)


def _compare(skeleton: Skeleton, index: int, hidden: Tensor, expected: Tensor, found: Tensor) -> None:
    change, error = float((expected - hidden).abs().max()), float((found - expected).abs().max())
    if not error <= TOLERANCE * change:
        raise UnsupportedError(
            f"{_path(skeleton, index)} of {type(skeleton.model).__name__} does more than queries, keys and values: "
            f"with keys and values rebuilt from a latent that loses nothing its block differs by {error:.2g}, where it "
            f"changes the hidden states by {change:.2g}. {INSTEAD}"
        )


def _keys_and_values(model: nn.Module, targets: dict[Role, Target]) -> Tensor:
    """Return [W_k; W_v], (2 · kv, hidden)."""
    return torch.cat(
        [weights.read(model.get_submodule(t.module).get_parameter("weight"), t) for t in (targets["k"], targets["v"])]
    )
