"""The layers of a checkpoint: modules that multiply by one matrix, which can be quantized."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers.pytorch_utils import Conv1D

from lowrank_compress.model.blueprint import Blueprint
from lowrank_compress.shipped.linear import CompressedLinear


@dataclass(frozen=True)
class Layer:
    """A module that multiplies by one matrix, which can be quantized.

    Attributes
    ----------
    path
        Of the module in the checkpoint's model; its weight is ``path.weight``.
    block
        Its block.
    shape
        (out, in).
    transposed
        Whether the weight lies as (in, out).
    expert
        Path of the routed expert that it is of; None of one that sees all tokens.
    experts
        How many of these there are in its block; 1 of one that sees all tokens.
    """

    path: str
    block: int
    shape: tuple[int, int]
    transposed: bool
    expert: str | None = None
    experts: int = 1

    @property
    def role(self) -> str:
        """What the matrix that it is of, or is a part of, is called in its expert."""
        return self.path.removeprefix(f"{self.expert}.").partition(".")[0] if self.expert else self.path

    @property
    def weights(self) -> int:
        """How many weights it has."""
        return self.shape[0] * self.shape[1]


def layers_of(plan: Blueprint) -> tuple[list[Layer], dict[str, str]]:
    """Find the layers of a checkpoint's blocks that can be quantized, and why others of the claimed ones cannot."""
    found: list[Layer] = []
    left: dict[str, str] = {}
    for path, targets in plan.resolved.modules().items():
        module = plan.model.get_submodule(path)
        block, expert = targets[0].block, None if targets[0].expert is None else path.rpartition(".")[0]
        inside = dict(module.named_children()) if isinstance(module, CompressedLinear) else {}
        for name, each in {f"{path}.{leaf}": child for leaf, child in inside.items()}.items() or [(path, module)]:
            if isinstance(each, nn.Linear) and each.weight.numel():
                found.append(
                    Layer(name, block, (each.out_features, each.in_features), False, expert, targets[0].experts)
                )
            elif isinstance(each, Conv1D):
                found.append(Layer(name, block, (each.weight.shape[1], each.weight.shape[0]), True))
            elif not isinstance(each, nn.Linear):
                left[name] = f"a {type(each).__name__} is no linear layer"
    for target in plan.resolved.outside:
        left[target.module] = "outside of the blocks"
    return found, left
