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
from lowrank_compress.model.walk.walk import Walk
from lowrank_compress.resources.resources import Resources

ROWS = 256


@dataclass(frozen=True, eq=False)
class Seen:
    """Inputs of a layer, float64 on the CPU.

    Attributes
    ----------
    peaks
        The largest magnitude of each, (in,).
    rows
        Those of some tokens, evenly spread over all, (k, in): about `ROWS`.
    """

    peaks: Tensor
    rows: Tensor


@dataclass(frozen=True, eq=False)
class LayerMoments:
    """What is known of a layer, float64 on the CPU.

    Attributes
    ----------
    gram
        E[x xᵀ] of what enters it, (in, in).
    fisher
        E[g gᵀ] of the gradients of the summed loss in what leaves it, (out, out); None where they were not asked for.
    seen
        What is known of single inputs; None where it was not asked for.
    """

    gram: Tensor
    fisher: Tensor | None
    seen: Seen | None = None


def layer_moments(
    skeleton: Skeleton,
    batches: Sequence[Batch],
    layers: Sequence[Sequence[str]],
    *,
    gradients: bool,
    single: bool = False,
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
    single
        Whether single inputs are (`Seen`).
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
    losses = sum(len(batch.ids) for batch in batches) if skeleton.task == "embedding" else tokens
    if gradients:
        disk = shutil.disk_usage(spill_to or tempfile.gettempdir()).free // 2
        length = segment_length(count, (disk if spill else memory) // boundary)
        steps = walk.backwards(segment=length, until=min(wanted, default=count), advance=advance)
    else:
        steps = walk.forwards(until=max(wanted, default=-1) + 1)
    for step in steps:
        sums = None
        if step.index in wanted:
            modules = {path: skeleton.model.get_submodule(path) for path in layers[step.index]}
            sums = _Sums(modules, gradients, clip, ROWS // len(batches) + 1 if single else 0)
            for number, batch in enumerate(walk.batches):
                with sums.hooked(batch):
                    step.run(number)
        step.leave()
        done = count - step.index if gradients else step.index + 1
        advance("backward" if gradients else "forward", done, count)
        if sums is not None:
            yield step.index, {path: sums.moments(path, tokens, losses) for path in layers[step.index]}


class _Sums:
    """Sums over batches, taken by hooks; layers that read the very same tensor share one.

    Of each batch `rows` inputs are kept.
    """

    def __init__(self, modules: Mapping[str, nn.Module], gradients: bool, clip: float | None, rows: int) -> None:
        self.modules, self.gradients, self.clip, self.rows = modules, gradients, clip, rows
        self.grams: dict[str, Tensor] = {}
        self.fishers: dict[str, Tensor] = {}
        self.shared: dict[str, str] = {}
        self.peaks: dict[str, Tensor] = {}
        self.kept: dict[str, list[Tensor]] = {}

    def moments(self, path: str, tokens: int, losses: int) -> LayerMoments:
        """Return what is known of a layer, means over so many tokens, and of gradients over so many losses."""
        own, fisher = self.shared.get(path, path), self.fishers.get(path)
        seen = Seen(self.peaks[own].cpu(), torch.cat(self.kept[own]).cpu()) if self.rows else None
        return LayerMoments(self.grams[own].cpu() / tokens, None if fisher is None else fisher.cpu() / losses, seen)

    def _keep(self, path: str, values: Tensor, real: Tensor | None) -> None:
        """Keep what single inputs (tokens, n) tell; `real` says which are no padding."""
        values = values if real is None else values[real.to(values.device)]
        peaks = values.abs().amax(0).double()
        self.peaks[path] = torch.maximum(self.peaks.get(path, peaks), peaks)
        places = torch.linspace(0, len(values) - 1, min(self.rows, len(values))).long()
        self.kept.setdefault(path, []).append(values[places.to(values.device)].double())

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
                    values = plain(args[0])
                    add(self.grams, path, values)
                    if self.rows:
                        self._keep(path, values, batch.real())
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
