"""One block of a compressed model fitted anew to what the dense one does, map by map, in the order of computation.

Maps that read one tensor are fitted together: queries, keys and values; the attention's output; gate and up; down. Each
sees what enters it once all before it are fitted. Routed experts (`refiningexperts`) come before an MLP beside them. Of
what the outputs of attention and MLP are to emit, what the residual stream lacks at that place is a part: they make up
for all that went wrong before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowrank_compress.arch.targets import Target
from lowrank_compress.artifacts.stream import Lazy
from lowrank_compress.calibration.looking import look, place_of
from lowrank_compress.calibration.pairs import PairSums
from lowrank_compress.calibration.shortcuts import Shortcuts
from lowrank_compress.calibration.statistics import statistic_key
from lowrank_compress.formats.dense import dense
from lowrank_compress.formats.spec import Encoded, Product
from lowrank_compress.formats.table import FORMATS, rebuild
from lowrank_compress.linalg.crossvalidated import Present, cross_validate, refit
from lowrank_compress.linalg.metric import Full
from lowrank_compress.linalg.refine import Sample, Task
from lowrank_compress.linalg.weighted import Projector, smaller_side
from lowrank_compress.model import weights
from lowrank_compress.model.skeleton import Skeleton
from lowrank_compress.model.walk.batch import Batch
from lowrank_compress.model.walk.states import StateStore
from lowrank_compress.model.walk.step import Step
from lowrank_compress.resources.resources import MOST_SUMS
from lowrank_compress.stages.maps import BEHIND, WRITERS, Map, maps_of
from lowrank_compress.stages.refiningexperts import fit_experts

DENSE, COMPRESSED = 0, 1


class BlockRefiner:
    """Fits blocks of a compressed model, each in the step of a walk over the dense model and the compressed one.

    Parameters
    ----------
    dense, compressed
        The models of the walk.
    batches
        The calibration set.
    lambdas
        To choose from.
    damping
        Relative shrinkage of Fisher matrices.
    keeps
        There is memory to keep what attention and MLP come to while a block is fitted (`kept_bytes`); no result
        depends on it.
    room
        Bytes that the sums of experts may take together; no result depends on it.
    directory
        Where what has become of lent experts lies meanwhile.
    """

    def __init__(
        self,
        dense: Skeleton,
        compressed: Skeleton,
        batches: Sequence[Batch],
        lambdas: Sequence[float],
        damping: float,
        *,
        keeps: bool = False,
        room: int = MOST_SUMS,
        directory: Path | None = None,
    ) -> None:
        self._keeps, self._room, self._directory = keeps, room, directory
        self.dense, self.compressed, self.batches = dense, compressed, batches
        self.lambdas, self.damping = lambdas, damping
        self.maps = maps_of(dense, compressed)
        self.dtype = compressed.blueprint.checkpoint.dtype
        self._places: dict[str, str | None] = {}

    def wanted(self) -> dict[str, frozenset[str]]:
        """What has to be known of the dense model's gradients, by target."""
        return {name: each.statistics for name, each in self.maps.items()}

    def keys(self, block: int) -> set[str]:
        """The same of a block, by the keys that it has among the block's statistics."""
        own = [each for each in self.maps.values() if each.target.block == block]
        return {statistic_key(each.target, name) for each in own for name in each.statistics}

    def block(
        self, step: Step, fisher: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor | Lazy], dict[str, float | None]]:
        """Fit a block in place.

        Parameters
        ----------
        step
            With the dense model's block and the compressed one's.
        fisher
            Statistics of the block's gradients.

        Returns
        -------
        tuple
            The tensors that are others now, by their names in the compressed model, as they will be stored; and the λ
            of each map, None for those that stay.
        """
        own = [each for each in self.maps.values() if each.target.block == step.index]
        routed = [each for each in own if each.target.expert is not None]
        groups = list(dict.fromkeys(each.target.reads for each in own if each not in routed))
        changed: dict[str, Tensor | Lazy] = {}
        store = StateStore(True, self._directory)
        chosen: dict[str, float | None] = {each.target.name: None for each in own}
        shortcuts = Shortcuts() if self._keeps else None

        def fit(members: Sequence[Map], halves: tuple[Sample, Sample]) -> None:
            with ExitStack() as stack:
                for model, path in product((self.dense, self.compressed), {each.target.module for each in members}):
                    stack.enter_context(model.having(path))
                found = self._fit(members, halves, fisher)
            for each, (strength, state) in zip(members, found, strict=True):
                chosen[each.target.name] = strength
                for leaf, tensor in state.items():
                    name = f"{each.target.module}.{leaf}"
                    tensor = tensor.to(self.dtype) if tensor.is_floating_point() else tensor
                    changed[name] = self._lent(name, tensor, store) if self.compressed.lends(name) else tensor

        first = next((number for number, reads in enumerate(groups) if reads in BEHIND), len(groups))
        for reads in groups[:first]:
            members = [each for each in own if each.target.reads == reads]
            fit(members, self._sums(step, members, shortcuts, last=reads == groups[-1] and not routed))
        if routed:
            block = f"{self.dense.resolved.blocks[step.index]}."
            out = next(each for each in self.dense.resolved.of_block(step.index) if each.role == "o")
            place = self._place(step, out.module.removeprefix(block))
            fit_experts(step, self.batches, block, place, routed, fit, self._room)
        for reads in groups[first:]:
            members = [each for each in own if each.target.reads == reads]
            fit(members, self._sums(step, members, shortcuts, last=reads == groups[-1]))
        if shortcuts is not None:
            for number in range(len(self.batches)):
                with shortcuts.taken(step, number, COMPRESSED):
                    step.run(number, COMPRESSED)
        return changed, chosen

    def _lent(self, name: str, tensor: Tensor, store: StateStore) -> Lazy:
        """Keep what a tensor of a lent expert has become, and have the expert run with it."""
        kept = store.keep(tensor)
        self.compressed.lend(name, kept.load)
        return Lazy(tuple(tensor.shape), tensor.dtype, kept.load)

    def _sums(
        self, step: Step, members: Sequence[Map], shortcuts: Shortcuts | None, last: bool
    ) -> tuple[Sample, Sample]:
        """Take the sums that maps need which read the same: of the inputs' targets, or of the outputs'."""
        target, writes = members[0].target, members[0].writes
        path = target.module.removeprefix(f"{self.dense.resolved.blocks[step.index]}.")
        place = self._place(step, path) if writes else None
        sums = PairSums()
        for number, batch in enumerate(self.batches):
            here = look(step, number, COMPRESSED, path, place, outputs=place is not None, shortcuts=shortcuts)
            there = look(step, number, DENSE, path, place, outputs=writes, run=last, shortcuts=shortcuts)
            if not writes:
                sums.add(batch, here.x, there.x)
                continue
            wanted = there.y
            assert wanted is not None
            if place is not None:
                parts = (there.total, here.total, here.y)
                total, stream, emitted = (part for part in parts if part is not None)
                wanted = total - (stream - emitted)
            bias = self._dense(target)[1]
            sums.add(batch, here.x, wanted if bias is None else wanted - bias.to(wanted))
        return sums.samples()

    def _place(self, step: Step, path: str) -> str | None:
        """Where the output of a module is added to the residual stream: in all blocks where it is in the first."""
        if path not in self._places:
            self._places[path] = place_of(step, 0, DENSE, path)
        return self._places[path]

    def _dense(self, target: Target) -> tuple[Tensor, Tensor | None]:
        """The matrix and the bias of a target in the dense model, float64."""
        module: Any = self.dense.model.get_submodule(target.module)
        weight = weights.read(module.weight, target).double()
        return weight, None if target.bias is None else weights.bias(module.bias, target).double()

    def _fit(
        self, members: Sequence[Map], halves: tuple[Sample, Sample], fisher: Mapping[str, Tensor]
    ) -> list[tuple[float | None, dict[str, Tensor]]]:
        made = [self._task(each, fisher) for each in members]
        tasks, present, teachers = [task for task, _, _ in made], [now for _, now, _ in made], [do for _, _, do in made]
        anchor = None
        if members[0].writes:
            weight = teachers[0][0]
            own = members[0].fewer_columns or members[0].merged
            anchor = members[0].stored.weight() if own else weight
        chosen = cross_validate(tasks, present, halves, anchor, self.lambdas)
        both = halves[0] + halves[1]
        found = []
        fits = refit(tasks, chosen, both, anchor)
        for each, task, teacher, strength, fit in zip(members, tasks, teachers, chosen, fits, strict=True):
            state = {} if fit is None else self._put(each, task, teacher, fit, both)
            found.append((strength, state))
        return found

    def _task(self, each: Map, fisher: Mapping[str, Tensor]) -> tuple[Task, Present, tuple[Tensor, Tensor | None]]:
        """What a map is to become, what it is, and the matrix and bias of what it is to do."""
        target, stored = each.target, each.stored
        now, bias = stored.weight(), stored.bias()
        weight, stock = (now, bias) if each.fewer_rows else self._dense(target)
        added = None if bias is None else bias if stock is None else bias - stock
        own = {name: fisher[statistic_key(target, name)].to(now) for name in each.statistics}
        rank = None if stored.format == "dense" else FORMATS[stored.format].rank(stored.parameters)
        side = smaller_side(stored.shape)
        affine = bias is not None
        if each.folded:
            metric = (1 - self.damping) * own["in_fisher"]
            metric += self.damping * own["out_square"].mean() * (weight.mT @ weight)
            task = Task(metric, rank, side, left=weight, affine=affine)
            return task, _folded(weight, now, added), (weight, stock)
        metric = (1 - self.damping) * own["out_fisher"]
        metric.diagonal().add_(self.damping * own["out_fisher"].diagonal().mean())
        task = Task(metric, rank, side, base=None if each.writes else weight, affine=affine)
        return task, Present(now, added), (weight, stock)

    def _put(
        self,
        each: Map,
        task: Task,
        teacher: tuple[Tensor, Tensor | None],
        fit: tuple[Tensor, Projector | None],
        sample: Sample,
    ) -> dict[str, Tensor]:
        """Put a fitted matrix, and the bias that goes with it, into its module, rounded as they will be stored."""
        (matrix, projector), stored = fit, each.stored
        part = self._encoded(each, matrix, projector, sample)
        bias = None
        if task.affine:
            weight, stock = teacher
            images = sample if each.writes else sample.of(weight)
            bias = images.offset(rebuild(part).to(matrix))
            bias = (bias if stock is None else bias + stock).to(self.dtype)
        return stored.put(part, bias)

    def _encoded(self, each: Map, matrix: Tensor, projector: Projector | None, sample: Sample) -> Encoded:
        name, stored = each.target.name, each.stored
        if projector is None:
            return dense(matrix.cpu()).cast(self.dtype, name)
        sensitivities = (torch.ones(stored.shape[0]).double(), sample.gram.diagonal().cpu() / sample.count)
        product = Product(name, matrix, projector, sensitivities, self.dtype)
        return FORMATS[stored.format].encode(product, stored.parameters)


def _folded(weight: Tensor, now: Tensor, bias: Tensor | None) -> Present:
    """Write what a map is now as W times something, as well as that goes."""
    root = Full(weight.mT @ weight).root().lower
    columns = now if bias is None else torch.cat([now, bias[:, None]], 1)
    solved = torch.cholesky_solve(weight.mT @ columns, root)
    return Present(solved[:, : now.shape[1]], None if bias is None else solved[:, -1])


def kept_bytes(skeleton: Skeleton, batches: Sequence[Batch]) -> int:
    """Bytes of what enters the matrices that write into the residual stream, in the largest block."""
    widths: dict[int, int] = {}
    for target in skeleton.resolved.targets:
        if target.reads in WRITERS:
            widths[target.block] = widths.get(target.block, 0) + target.shape[1]
    return sum(batch.ids.numel() for batch in batches) * max(widths.values(), default=0) * skeleton.dtype.itemsize


def computing_dtype(compressed: torch.dtype) -> torch.dtype:
    """In which to compute: what is stored loses nothing in it."""
    return torch.promote_types(compressed, torch.float32)
