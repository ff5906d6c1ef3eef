"""Walk one model or several block by block, forwards or backwards, with one block of each in memory.

A walk yields a step for each block: the block of every model, in memory, and what enters it in every batch. The caller
runs blocks as it needs, with hooks, on inputs of its own, or with other weights, which may be put into a block while
the step lasts; what it has not run by then the walk runs, with the block as it is, so that every state goes on.

The two directions are two methods, not a parameter: the way back needs a loss and a length of segments, and only the
way forward ends with states that a head can be run on.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence

from torch import Tensor

from lowrank_compress.errors import InputError
from lowrank_compress.model.skeleton import Skeleton
from lowrank_compress.model.walk.batch import Batch
from lowrank_compress.model.walk.head import head_gradient
from lowrank_compress.model.walk.replay import Replay
from lowrank_compress.model.walk.states import State, StateStore
from lowrank_compress.model.walk.step import Lanes, Step

Gradient = Callable[["Walk", int, int], Tensor | None]
"""(walk, number of a batch, model) -> gradient of the summed loss in what leaves the model's last block, or None."""


def gradient_of_loss(walk: Walk, number: int, model: int) -> Tensor:
    """Gradient of the loss that the model is trained with: of next tokens, or of a classifier's labels."""
    return head_gradient(walk.replay(model), walk.batches[number], walk.leaving(number, model))


class Walk:
    """A way through the blocks of one model or several, side by side.

    Parameters
    ----------
    models
        One or more, of equally many blocks. The same one may be given several times: it is read once, and each place
        in the list has hidden states of its own, so that one block can be run with several sets of weights in turn.
    batches
        What the models are run on; none where only the blocks themselves are of interest.
    store
        Keeps the hidden states between blocks; in memory if not given.
    feeds
        For each model, the one whose states enter its blocks; by default each its own. What leaves the blocks of a
        model that is fed by another is the caller's alone: no later block sees it.

    Raises
    ------
    InputError
        The models have not equally many blocks, or a model is fed by one that is fed itself.
    """

    def __init__(
        self,
        models: Sequence[Skeleton],
        batches: Sequence[Batch] = (),
        *,
        store: StateStore | None = None,
        feeds: Sequence[int] | None = None,
    ) -> None:
        counts = [len(model.resolved.blocks) for model in models]
        if len(set(counts)) != 1:
            raise InputError(f"Models that are walked through together have {counts} blocks; expected equally many.")
        self.models = tuple(models)
        self.batches = batches
        self.blocks = counts[0]
        feeds = tuple(range(len(models)) if feeds is None else feeds)
        own = {model for model, feeder in enumerate(feeds) if model == feeder}
        if len(feeds) != len(models) or not own.issuperset(feeds):
            raise InputError(f"{len(models)} models are fed by {feeds}; expected one that feeds itself for each.")
        made = {model: Replay(model, batches) for model in models}
        self._lanes = Lanes(tuple(made[model] for model in models), feeds, store or StateStore())
        self._states: list[list[State]] = []

    def forwards(self, until: int | None = None) -> Generator[Step]:
        """Walk from the first block to the last, or to the one before `until`; in memory are the states of one place.

        Raises
        ------
        CheckpointError
            A tensor of a block is missing, damaged or not finite.
        """
        self._states = self._entering_first()
        for index in range(self.blocks if until is None else until):
            yield from self._visit(Step(self._lanes, index, index + 1, self._states))

    def backwards(
        self,
        gradient: Gradient = gradient_of_loss,
        *,
        segment: int = 1,
        until: int = 0,
        advance: Callable[[str, int, int], None] = lambda step, done, total: None,
    ) -> Generator[Step]:
        """Run all blocks forwards, and walk from the last to block `until` with the gradients of a loss.

        Every block is run a second time on its step, and a third time where segments are longer than one block.

        Parameters
        ----------
        gradient
            The loss's gradient in what leaves a model's last block, (sequences, length, width); asked for each batch
            in turn, and in it for each model. A model that it is None for has no part in the loss: its states go along
            but no gradient does.
        segment
            What enters every how many blocks is kept on the way forward.
        until
            The block to stop at.
        advance
            Called with ("forward" or "loss", done, total) before the first step.

        Raises
        ------
        CheckpointError
            A tensor of a block is missing, damaged or not finite.
        NumericsError
            A loss is not finite.
        """
        kept: dict[int, list[list[State]]] = {}
        states = self._states = self._entering_first()
        for index in range(self.blocks):
            if index % segment == 0:
                kept[index] = [list(part) for part in states]
            self._pass(index, states)
            advance("forward", index + 1, self.blocks)
        gradients: list[list[State | None]] = [[] for _ in self.models]
        for number in range(len(self.batches)):
            for model, feeder in enumerate(self._lanes.feeds):
                found = gradient(self, number, model) if model == feeder else None
                gradients[model].append(None if found is None else self._lanes.store.keep(found))
                del found
            advance("loss", number + 1, len(self.batches))
        for model in self.models:
            model.drop_outside()
        self._states = states = []
        for index in range(self.blocks - 1, until - 1, -1):
            for earlier in range(max(kept), index):
                kept[earlier + 1] = [list(part) for part in kept[earlier]]
                self._pass(earlier, kept[earlier + 1])
            yield from self._visit(Step(self._lanes, index, index - 1, kept.pop(index), gradients))

    def replay(self, model: int = 0) -> Replay:
        """How the parts of a model are called."""
        return self._lanes.replays[model]

    def leaving(self, number: int, model: int = 0) -> Tensor:
        """What leaves the last block that was walked through forwards, (sequences, length, width)."""
        return self._lanes.replays[model].load(self._states[model][number])

    def head(self, number: int, hidden: Tensor, start: int = 0, stop: int | None = None, model: int = 0) -> Tensor:
        """Logits of some positions of a batch from what leaves the last block; see `Replay.head`."""
        return self._lanes.replays[model].head(self.batches[number], hidden, start, stop)

    def _entering_first(self) -> list[list[State]]:
        replays, store = self._lanes.replays, self._lanes.store
        made = {replay: [store.keep(hidden) for hidden in replay.start()] for replay in dict.fromkeys(replays)}
        own = enumerate(self._lanes.feeds)
        return [list(made[replays[model]]) if model == feeder else [] for model, feeder in own]

    def _pass(self, index: int, states: list[list[State]]) -> None:
        """Run a block on all states, and replace them by what leaves it."""
        for _ in self._visit(Step(self._lanes, index, index + 1, states)):
            pass

    @staticmethod
    def _visit(step: Step) -> Generator[Step]:
        with step:
            yield step
            step.leave()
