"""One step of a walk: a block of each model in memory, and what enters it."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lowrank_compress.model.walk.batch import Batch
from lowrank_compress.model.walk.replay import Replay
from lowrank_compress.model.walk.states import State, StateStore


@dataclass(frozen=True)
class Lanes:
    """What the hidden states of several models go along in.

    Attributes
    ----------
    replays
        How the blocks of each model are called.
    feeds
        For each model, the one whose states enter its blocks.
    store
        Keeps the states between blocks.
    """

    replays: tuple[Replay, ...]
    feeds: tuple[int, ...]
    store: StateStore


class Step:
    """One block of each model, in memory until the walk goes on, or `leave` is called.

    Attributes
    ----------
    index
        Which block.
    blocks
        That of each model; the same module for a model that was given several times. Weights that are replaced in one
        are those that it is run with from then on; they vanish with the step.
    """

    def __init__(
        self,
        lanes: Lanes,
        index: int,
        then: int,
        states: list[list[State]],
        gradients: list[list[State | None]] | None = None,
    ) -> None:
        self.index = index
        self._lanes, self._states, self._gradients = lanes, states, gradients
        self._forward: set[tuple[int, int]] = set()
        models = [replay.skeleton for replay in lanes.replays]
        with ExitStack() as stack:
            made = {model: stack.enter_context(model.block(index, then=then)) for model in dict.fromkeys(models)}
            self._memory = stack.pop_all()
        self.blocks: tuple[nn.Module, ...] = tuple(made[model] for model in models)

    def batch(self, number: int) -> Batch:
        """Return a batch of the walk."""
        return self._lanes.replays[0].batches[number]

    def entering(self, number: int, model: int = 0) -> Tensor:
        """What enters the block in a batch, (sequences, length, width), until the batch is put forward.

        Raises
        ------
        ValueError
            It is forward already.
        """
        feeder = self._lanes.feeds[model]
        if (feeder, number) in self._forward:
            raise ValueError(f"Batch {number} has left block {self.index} of model {feeder}; expected it to enter.")
        return self._lanes.replays[model].load(self._states[feeder][number])

    def gradient(self, number: int, model: int = 0) -> Tensor | None:
        """On the way back: the loss's gradient in what leaves the block, until put forward; None if there is none."""
        kept = None if self._gradients is None else self._gradients[model][number]
        return None if kept is None else self._lanes.replays[model].load(kept)

    def call(self, number: int, hidden: Tensor, model: int = 0) -> Tensor:
        """Run a block as it is called in a batch, on any hidden states; nothing is put forward."""
        return self._lanes.replays[model].step(self.index, self.blocks[model], number, hidden)

    def parameter(self, path: str, model: int = 0) -> Tensor:
        """Return a parameter, by its name below the block, as the block is run with it."""
        skeleton = self._lanes.replays[model].skeleton
        return skeleton.parameter(f"{skeleton.resolved.blocks[self.index]}.{path}")

    def run(self, number: int, model: int = 0) -> tuple[Tensor, Tensor]:
        """Run a block on a batch, and put forward what leaves it; on the way back, the gradient in what enters it.

        Gradients in parameters of the block that require them are added to their ``grad``.

        Returns
        -------
        tuple
            What enters and what leaves the block, (sequences, length, width) each.
        """
        entering, gradient = self.entering(number, model), self.gradient(number, model)
        if gradient is None:
            with torch.no_grad():
                leaving = self.call(number, entering, model)
            self.keep(number, leaving, model)
            return entering, leaving
        entering = entering.detach().requires_grad_()
        learning = [parameter for parameter in self.blocks[model].parameters() if parameter.requires_grad]
        with torch.enable_grad():
            leaving = self.call(number, entering, model)
            found, *own = torch.autograd.grad(leaving, [entering, *learning], gradient, allow_unused=bool(learning))
        for parameter, part in zip(learning, own, strict=True):
            if part is not None:  # of an expert that no token went to, there is none
                parameter.grad = part if parameter.grad is None else parameter.grad + part
        self.keep(number, found, model)
        return entering.detach(), leaving.detach()  # the graph holds all that hooks have seen

    def advance(self, model: int = 0) -> None:
        """Run a block on all batches that are not forward yet, where anything would be put forward."""
        for number in range(len(self._lanes.replays[model].batches)):
            if self._goes_on(number, model) and (model, number) not in self._forward:
                self.run(number, model)

    def keep(self, number: int, states: Tensor, model: int = 0) -> None:
        """Put forward what the caller has computed: what leaves the block, on the way back the gradient in what enters.

        Of a model that another one feeds, or that has no part in the loss, nothing is put forward.
        """
        if self._goes_on(number, model):
            parts: list[list[State]] | list[list[State | None]] = self._gradients or self._states
            parts[model][number] = self._lanes.store.keep(states)
            self._forward.add((model, number))

    def leave(self) -> None:
        """Advance all models, and let their blocks go from memory; the walk does it where the caller has not."""
        if self.blocks:
            for model in range(len(self.blocks)):
                self.advance(model)
            self.__exit__()

    def _goes_on(self, number: int, model: int) -> bool:
        """Whether what a model makes of a batch here is for another block."""
        own = self._lanes.feeds[model] == model
        return own and (self._gradients is None or self._gradients[model][number] is not None)

    def __enter__(self) -> Step:
        return self

    def __exit__(self, *_: object) -> None:
        self.blocks, self._states, self._gradients = (), [], None
        self._memory.close()
