"""What a module sees in a step of a walk, and where what it emits meets the residual stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_compress.calibration.shortcuts import Shortcuts
from lowrank_compress.model.walk.step import Step

# How near, relative to itself, a shift must come out at the place where it is added.
EXACT = 1e-2


class _Enough(Exception):
    """All that was asked for has been seen: the rest of the block need not be run."""


@dataclass(frozen=True)
class Look:
    """What a module sees of one batch; all (sequences, length, …), in the computing dtype.

    Attributes
    ----------
    x, y
        What enters the module, and what leaves it; y is None where only x was asked for.
    total
        What the residual stream is where y was added to it; None where that is nowhere.
    """

    x: Tensor
    y: Tensor | None = None
    total: Tensor | None = None


def look(
    step: Step,
    number: int,
    model: int,
    path: str,
    place: str | None = None,
    *,
    outputs: bool = True,
    run: bool = False,
    shortcuts: Shortcuts | None = None,
) -> Look:
    """Run a block on a batch as far as needed to see what a module does.

    Parameters
    ----------
    step, number, model
        Which block, batch and model.
    path
        The module, below the block.
    place
        The module, below the block, that is given the stream with y added; "" for the block's own output.
    outputs
        Whether y is asked for.
    run
        Put the batch forward, too.
    shortcuts
        What need not be run; if y is asked for and the batch stays, what enters the module is noted in it.
    """
    block = step.blocks[model]
    module = block.get_submodule(path)
    seen: dict[str, Tensor] = {}
    last = "" if run or place == "" else "total" if place is not None else "y" if outputs else "x"

    def note(name: str, value: Tensor) -> None:
        seen[name] = value.detach()
        if name == last:
            raise _Enough

    def entering(name: str) -> Callable[[Any, tuple[Any, ...]], None]:
        return lambda _, args: note(name, args[0])

    def leaving_it(_: Any, args: Any, out: Any) -> None:
        note("y", out)

    handles = [
        module.register_forward_pre_hook(entering("x")),
        module.register_forward_hook(leaving_it),
    ]
    if place:
        handles.append(block.get_submodule(place).register_forward_pre_hook(entering("total")))
    try:
        with ExitStack() as stack:
            if shortcuts is not None:
                stack.enter_context(shortcuts.taken(step, number, model))
                if outputs and not run:
                    stack.enter_context(shortcuts.noted(step, number, model, path))
            leaving = _forward(step, number, model, run)
    finally:
        for handle in handles:
            handle.remove()
    if place == "":
        assert leaving is not None
        seen["total"] = leaving
    shape = step.batch(number).ids.shape
    x, y, total = (None if part is None else part.reshape(*shape, -1) for part in map(seen.get, ("x", "y", "total")))
    assert x is not None
    return Look(x, y, total)


def _forward(step: Step, number: int, model: int, run: bool) -> Tensor | None:
    if run:
        return step.run(number, model)[1]
    try:
        with torch.no_grad():
            return step.call(number, step.entering(number, model), model)
    except _Enough:
        return None


def place_of(step: Step, number: int, model: int, path: str) -> str | None:
    """Find where in a block what a module emits is added to the residual stream.

    It is shifted by something small and random, and the first to see just this shift, beside the module itself, is the
    place: a module with parameters of its own, such as the norm that follows, or the block's output. Where the output
    is scaled or normalised first, nobody does.

    Returns
    -------
    str or None
        As `look` takes it.
    """
    block = step.blocks[model]
    module = block.get_submodule(path)
    generator = torch.Generator().manual_seed(0)
    shift: list[Tensor] = []

    def shifted(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        noise = torch.randn(out.shape, generator=generator, dtype=torch.float32).to(out)
        shift.append(noise * out.square().mean().sqrt())
        return out + shift[-1]

    with torch.no_grad():
        entering = step.entering(number, model)
        with _inputs(block) as plain:
            left = step.call(number, entering, model)
        handle = module.register_forward_hook(shifted)
        try:
            with _inputs(block) as moved:
                then = step.call(number, entering, model)
        finally:
            handle.remove()
    plain[""], moved[""] = left, then
    (by,) = shift
    for name, before in plain.items():
        after = moved.get(name)
        if after is None or after.numel() != by.numel():
            continue
        # Some families run their MLPs on all tokens in a row.
        if float((after - before - by.view_as(after)).norm()) <= EXACT * float(by.norm()):
            return name
    return None


@contextmanager
def _inputs(block: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Keep what enters each module that has parameters of its own, in the order of computation."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[Any, tuple[Any, ...]], None]:
        def note(_: Any, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], Tensor):
                seen.setdefault(name, args[0].detach())

        return note

    handles = [
        module.register_forward_pre_hook(keep(name))
        for name, module in block.named_modules()
        if name and next(module.parameters(recurse=False), None) is not None
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
