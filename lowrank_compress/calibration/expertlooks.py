"""What the routed experts of a block are called with in a step of a walk, and what lacks behind them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lowrank_compress.model.walk.step import Step


class _Seen(Exception):
    """The experts were called: the rest of the block need not be run."""


@dataclass(frozen=True)
class ExpertsCall:
    """A call of a block's experts.

    Attributes
    ----------
    x
        What enters them, (tokens, size).
    index, weights
        The router's choices, and what it multiplies their outputs with, (tokens, experts a token).
    stream
        The residual stream that their sum is added to, (tokens, size); None where it is not known.
    """

    x: Tensor
    index: Tensor
    weights: Tensor
    stream: Tensor | None


def look_at_experts(step: Step, number: int, model: int, path: str, place: str | None) -> ExpertsCall:
    """Run a block on a batch up to its experts.

    Parameters
    ----------
    step, number, model
        Which block, batch and model.
    path
        The experts, below the block.
    place
        The module, below the block, that the residual stream enters which the experts' output is added to; None where
        there is no such.
    """
    block, seen = step.blocks[model], dict[str, Tensor]()
    made: list[ExpertsCall] = []

    def enter(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen["stream"] = args[0].detach()

    def call(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        x, index, weights = (part.detach() for part in args)
        stream = seen.get("stream")
        made.append(ExpertsCall(x, index, weights, None if stream is None else stream.reshape(x.shape)))
        raise _Seen

    handles = [block.get_submodule(path).register_forward_pre_hook(call)]
    if place:
        handles.append(block.get_submodule(place).register_forward_pre_hook(enter))
    try:
        with torch.no_grad():
            step.call(number, step.entering(number, model), model)
    except _Seen:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return made[0]


@torch.no_grad()
def lacking(dense: nn.Module, there: ExpertsCall, here: ExpertsCall) -> Tensor | float:
    """What an expert of a compressed model is to emit beside what the dense model's does: (tokens, size).

    So much that the residual stream behind it is the dense model's, though it was another before, and the router chose
    otherwise: what lacks, divided by the sum of the router's weights, which all experts of a token share.
    """
    if there.stream is None or here.stream is None:
        return 0.0
    owed = there.stream - here.stream
    owed = owed + dense(there.x, there.index, there.weights) - dense(there.x, here.index, here.weights)
    return owed / here.weights.sum(-1, keepdim=True).clamp_min(1e-3).to(owed)
