"""Second moments of what enters the linear layers of a model and of the gradients in what leaves them, by block.

Of any checkpoint, compressed or not: a layer is a module that multiplies by one matrix, those inside of compressed
modules among them.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lowrank_compress.calibration.hooks import clipping
from lowrank_compress.errors import NumericsError
from lowrank_compress.model.skeleton import Skeleton
from lowrank_compress.model.walk.batch import Batch
from lowrank_compress.model.walk.segments import boundary_bytes, most_kept, segment_length
from lowrank_compress.model.walk.states import StateStore
from lowrank_compress.model.walk.step import Step
from lowrank_compress.model.walk.walk import Walk
from lowrank_compress.resources.resources import Resources


@dataclass(frozen=True, eq=False)
class LayerMoments:
    """What is known of a layer, float64 on the CPU.

    Attributes
    ----------
    gram
        E[x xᵀ] of what enters it, (in, in).
    fisher
        E[g gᵀ] of the gradients of the summed loss in what leaves it, (out, out); None where they were not asked for.
    """

    gram: Tensor
    fisher: Tensor | None


def layer_moments(
    skeleton: Skeleton,
    batches: Sequence[Batch],
    layers: Sequence[Sequence[str]],
    *,
    gradients: bool,
    skip: Callable[[int], bool] = lambda block: False,
    clip: float | None = None,
    advance: Callable[[str, int, int], None] = lambda step, done, total: None,
    spill_to: Path | None = None,
    resources: Resources = Resources(),
) -> Iterator[tuple[int, dict[str, LayerMoments]]]:
    """Yield the number of each block and the moments of its layers: last to first where gradients are taken.

    Parameters
    ----------
    skeleton
        The model.
    batches
        The calibration set.
    layers
        Paths of the layers of each block.
    gradients
        Whether those are asked for.
    skip, clip, advance, spill_to, resources
        As `capture.capture` has them; the processes do not share the work.

    Raises
    ------
    NumericsError
        Activations or gradients are NaN or infinite.
    """
    count, boundary = len(skeleton.resolved.blocks), boundary_bytes(skeleton, batches)
    memory = resources.for_states
    spill = boundary * (most_kept(count, 1) if gradients else 1) > memory
    walk = Walk([skeleton], batches, store=StateStore(spill, spill_to))
    wanted = [block for block in range(count) if not skip(block)]
    tokens = sum(batch.tokens for batch in batches)
    if gradients:
        disk = shutil.disk_usage(spill_to or tempfile.gettempdir()).free // 2
        length = segment_length(count, (disk if spill else memory) // boundary)
        steps = walk.backwards(segment=length, until=min(wanted, default=count), advance=advance)
    else:
        steps = walk.forwards(until=max(wanted, default=-1) + 1)
    for step in steps:
        found = _measure(walk, skeleton, step, layers[step.index], gradients, clip) if step.index in wanted else None
        step.leave()
        done = count - step.index if gradients else step.index + 1
        advance("backward" if gradients else "forward", done, count)
        if found is not None:
            yield (
                step.index,
                {
                    path: LayerMoments(gram.cpu() / tokens, None if fisher is None else fisher.cpu() / tokens)
                    for path, (gram, fisher) in found.items()
                },
            )


def _measure(
    walk: Walk, skeleton: Skeleton, step: Step, layers: Sequence[str], gradients: bool, clip: float | None
) -> dict[str, tuple[Tensor, Tensor | None]]:
    sums = _Sums({path: skeleton.model.get_submodule(path) for path in layers}, gradients, clip)
    for number, batch in enumerate(walk.batches):
        with sums.hooked(batch):
            step.run(number)
    return {path: (sums.grams[sums.shared.get(path, path)], sums.fishers.get(path)) for path in layers}


class _Sums:
    """Sums over batches, taken by hooks; layers that read the very same tensor share one."""

    def __init__(self, modules: Mapping[str, nn.Module], gradients: bool, clip: float | None) -> None:
        self.modules, self.gradients, self.clip = modules, gradients, clip
        self.grams: dict[str, Tensor] = {}
        self.fishers: dict[str, Tensor] = {}
        self.shared: dict[str, str] = {}

    @contextmanager
    def hooked(self, batch: Batch) -> Iterator[None]:
        """Add what the layers see while inside."""
        mask = None if batch.mask is None else batch.mask.bool()[..., None]
        first = not self.grams
        read: list[tuple[str, Tensor]] = []  # kept, so that no other tensor comes to lie in its place

        def plain(values: Tensor) -> Tensor:
            values = values.detach().reshape(*batch.ids.shape, -1)
            values = values if mask is None else values.masked_fill(~mask.to(values.device), 0)
            return values.flatten(0, 1)

        def add(sums: dict[str, Tensor], path: str, values: Tensor) -> None:
            if not bool(torch.isfinite(values).all()):
                raise NumericsError(
                    f"What is seen at {path} is NaN or infinite on the calibration data. Check the checkpoint."
                )
            moment = (values.mT @ values).double()
            sums[path] = sums[path].add_(moment) if path in sums else moment

        def hook(path: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
            def after(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
                same = next((other for other, x in read if first and x is args[0]), None)
                if same is not None:
                    self.shared[path] = same
                if path not in self.shared:
                    read.append((path, args[0]))
                    add(self.grams, path, plain(args[0]))
                if self.gradients and out.requires_grad:
                    out.register_hook(lambda gradient: add(self.fishers, path, self._clipped(plain(gradient))))

            return after

        handles = [module.register_forward_hook(hook(path)) for path, module in self.modules.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _clipped(self, gradient: Tensor) -> Tensor:
        shares = clipping(gradient, self.clip)
        return gradient if shares is None else gradient * shares
