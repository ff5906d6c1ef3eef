"""What need not be run a second time in one step of a walk: attention or MLP up to its last matrix.

Both end in a matrix whose output is theirs. Once all before it is final, what enters it is kept, and whenever the block
is run again, that matrix alone is: the same operation on the same numbers, so that the result is the same to the bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_compress.model.walk.step import Step


@dataclass(frozen=True)
class _Ending:
    """The module that a matrix ends, below the block, and how many outputs it has; one is a tensor, not a tuple."""

    path: str
    outputs: int | None


class Shortcuts:
    """Inputs of last matrices, batch by batch, for one step of a walk."""

    def __init__(self) -> None:
        self._kept: dict[tuple[int, int], dict[str, tuple[_Ending, Tensor]]] = {}

    @contextmanager
    def noted(self, step: Step, number: int, model: int, path: str) -> Iterator[None]:
        """Keep what enters a matrix, below the block, where it ends a module, if the module is run meanwhile."""
        block, (above, _, _) = step.blocks[model], path.rpartition(".")
        seen: list[Tensor] = []

        def note(_: Any, args: tuple[Tensor, ...], out: Tensor) -> None:
            seen[:] = [args[0].detach(), out.detach()]

        def check(_: Any, args: Any, out: Any) -> None:
            first, rest = (out[0], out[1:]) if isinstance(out, tuple) else (out, ())
            if seen and not any(part is not None for part in rest) and _same(first, seen[1]):
                ending = _Ending(above, len(out) if isinstance(out, tuple) else None)
                self._kept.setdefault((number, model), {})[path] = ending, seen[0]

        handles = [block.get_submodule(path).register_forward_hook(note)]
        if above:
            handles.append(block.get_submodule(above).register_forward_hook(check))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def taken(self, step: Step, number: int, model: int) -> Iterator[None]:
        """Run of what is known only the last matrices, while inside."""
        block = step.blocks[model]
        with ExitStack() as stack:
            for path, (ending, x) in self._kept.get((number, model), {}).items():
                module, matrix = block.get_submodule(ending.path), block.get_submodule(path)
                module.forward = _only(matrix, x, ending.outputs)
                stack.callback(delattr, module, "forward")
            yield


def _only(matrix: nn.Module, x: Tensor, outputs: int | None) -> Any:
    def forward(*_: Any, **__: Any) -> Any:
        y = matrix(x)
        return y if outputs is None else (y, *[None] * (outputs - 1))

    return forward


def _same(one: Any, other: Tensor) -> bool:
    return isinstance(one, Tensor) and one.shape == other.shape and torch.equal(one, other)
