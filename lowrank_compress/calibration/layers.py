"""Second moments of what enters the linear layers of a model and of the gradients in what leaves them, by block.

Of any checkpoint, compressed or not: a layer is a module that multiplies by one matrix, those inside of compressed
modules among them. Those of a routed expert see the tokens that go to it; what means are taken over is as `experts` has
it, so that losses of all layers compare.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lowrank_compress.calibration.experts import Routing
from lowrank_compress.calibration.hooks import clipping
from lowrank_compress.errors import NumericsError
from lowrank_compress.model.names import experts_of
from lowrank_compress.model.skeleton import Skeleton
from lowrank_compress.model.walk.batch import Batch
from lowrank_compress.model.walk.head import head_loss
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
        Those of some tokens, evenly spread over all, (k, in): about `ROWS`. Of an expert's layer they are scaled so
        that the mean of x xᵀ over all that it sees is the Gram matrix.
    """

    peaks: Tensor
    rows: Tensor


@dataclass(frozen=True, eq=False)
class LayerMoments:
    """What is known of a layer, float64 on the CPU.

    Attributes
    ----------
    gram
        E[x xᵀ] of what enters it, (in, in); of an expert's layer, where no gradients are taken, with each token times
        what the router multiplies the expert's output with. Zeros where no token goes.
    fisher
        E[g gᵀ] of the gradients of the summed loss in what leaves it, (out, out); None where they were not asked for.
    tokens
        How many it sees.
    given
        What the router multiplies its expert's output with, summed and divided by all tokens; 1 where there is none.
    seen
        What is known of single inputs; None where it was not asked for, or no token goes there.
    """

    gram: Tensor
    fisher: Tensor | None
    tokens: int
    given: float = 1.0
    seen: Seen | None = None


def layer_moments(
    skeleton: Skeleton,
    batches: Sequence[Batch],
    layers: Sequence[Sequence[str]],
    *,
    gradients: bool,
    single: bool = False,
    head: str | None = None,
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
    head
        Path of a language model's head, of which the Gram matrix alone is taken, over the positions whose next token is
        scored. Its block is the one behind the last; None for none.
    skip, clip, advance, spill_to, resources
        As `capture.capture` has them; the processes do not share the work.

    Raises
    ------
    NumericsError
        Activations or gradients are NaN or infinite.
    """
    count, boundary = len(skeleton.resolved.blocks), boundary_bytes(skeleton, batches)
    last = None if head is None or skip(count) else _Entering(skeleton.model.get_submodule(head))
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
        steps = walk.forwards(until=count if last else max(wanted, default=-1) + 1)
    for step in steps:
        sums = None
        if gradients and last is not None and head is not None:  # the loss has been taken
            yield count, {head: last.moments()}
            last = None
        if step.index in wanted:
            modules = {path: skeleton.model.get_submodule(path) for path in layers[step.index]}
            routes = _routes(skeleton.model, modules)
            sums = _Sums(modules, routes, gradients, clip, ROWS // len(batches) + 1 if single else 0)
            for number, batch in enumerate(walk.batches):
                with sums.hooked(batch):
                    step.run(number)
        step.leave()
        done = count - step.index if gradients else step.index + 1
        advance("backward" if gradients else "forward", done, count)
        if sums is not None:
            yield step.index, {path: sums.moments(path, tokens, losses) for path in layers[step.index]}
    if last is not None and head is not None:
        if not gradients:
            for number, batch in enumerate(walk.batches):
                head_loss(walk.replay(), batch, walk.leaving(number))
            skeleton.drop_outside()
        yield count, {head: last.moments()}


class _Entering:
    """Sums what enters a head from now on."""

    def __init__(self, module: nn.Module) -> None:
        self.gram: Tensor | None = None
        self.tokens = 0
        self._handle = module.register_forward_hook(self._add)

    def _add(self, module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        values = args[0].detach().flatten(0, -2)
        moment = (values.mT @ values).double()
        self.gram = moment if self.gram is None else self.gram.add_(moment)
        self.tokens += len(values)

    def moments(self) -> LayerMoments:
        """Return what has been seen, and look no more."""
        self._handle.remove()
        assert self.gram is not None
        return LayerMoments(self.gram.cpu() / self.tokens, None, self.tokens)


def _routes(model: nn.Module, layers: Iterable[str]) -> dict[str, tuple[nn.Module, int]]:
    """Return, for each layer of an expert, its block's experts and its expert's number among them."""
    found: dict[str, tuple[nn.Module, int]] = {}
    for path, experts in experts_of(model).items():
        for layer in layers:
            if layer.startswith(f"{path}."):
                found[layer] = (experts, int(layer.removeprefix(f"{path}.").partition(".")[0]))
    return found


class _Sums:
    """Sums over batches, taken by hooks; layers that read the very same tensor share one.

    Of each batch `rows` inputs are kept.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        routes: Mapping[str, tuple[nn.Module, int]],
        gradients: bool,
        clip: float | None,
        rows: int,
    ) -> None:
        self.modules, self.routes = modules, routes
        self.gradients, self.clip, self.rows = gradients, clip, rows
        self.routed: dict[str, tuple[int, float]] = {}
        self.grams: dict[str, Tensor] = {}
        self.fishers: dict[str, Tensor] = {}
        self.shared: dict[str, str] = {}
        self.peaks: dict[str, Tensor] = {}
        self.kept: dict[str, list[Tensor]] = {}

    def moments(self, path: str, tokens: int, losses: int) -> LayerMoments:
        """Return what is known of a layer, means over so many tokens, and of gradients over so many losses."""
        own, fisher = self.shared.get(path, path), self.fishers.get(path)
        there, given = self.routed.get(path, (0, 0.0)) if path in self.routes else (tokens, float(tokens))
        if not there:
            rows, columns = self.modules[path].get_parameter("weight").shape
            zeros = torch.zeros(rows, rows, dtype=torch.float64) if self.gradients else None
            return LayerMoments(torch.zeros(columns, columns, dtype=torch.float64), zeros, 0, 0.0)
        share = (there / tokens) ** 0.5
        seen = Seen(self.peaks[own].cpu(), torch.cat(self.kept[own]).cpu() * share) if self.rows else None
        fisher = None if fisher is None else fisher.cpu() / (losses * there / tokens)
        return LayerMoments(self.grams[own].cpu() / tokens, fisher, there, given / tokens, seen)

    def _keep(self, path: str, values: Tensor, real: Tensor | None, weights: Tensor | None) -> None:
        """Keep what single inputs (tokens, n) tell; `real` says which are no padding, weights what they count."""
        values = values if real is None else values[real.to(values.device)]
        peaks = values.abs().amax(0).double()
        self.peaks[path] = torch.maximum(self.peaks.get(path, peaks), peaks)
        places = torch.linspace(0, len(values) - 1, min(self.rows, len(values))).long()
        values = values if weights is None else values * weights
        self.kept.setdefault(path, []).append(values[places.to(values.device)].double())

    @contextmanager
    def hooked(self, batch: Batch) -> Iterator[None]:
        """Add what the layers see while inside."""
        mask = None if batch.mask is None else batch.mask.bool()[..., None]
        first = not self.grams
        read: list[tuple[str, Tensor]] = []  # kept, so that no other tensor comes to lie in its place

        routing = Routing(batch)

        def plain(values: Tensor, path: str) -> Tensor:
            if path in self.routes:
                return values.detach()[routing.of(self.routes[path][1]).rows]
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
                weights = self._routed(path, routing)
                if path not in self.shared:
                    read.append((path, args[0]))
                    values = plain(args[0], path)
                    weights = None if weights is None or self.gradients else weights.to(values)
                    add(self.grams, path, values if weights is None else values * weights)
                    if self.rows and len(values):
                        self._keep(path, values, None if path in self.routes else batch.real(), weights)
                if self.gradients and out.requires_grad:
                    out.register_hook(lambda gradient: add(self.fishers, path, self._clipped(plain(gradient, path))))

            return after

        handles = [module.register_forward_hook(hook(path)) for path, module in self.modules.items()]
        handles += [routing.watch(experts) for experts in dict.fromkeys(each for each, _ in self.routes.values())]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _routed(self, path: str, routing: Routing) -> Tensor | None:
        """Count the tokens of a layer's expert; return what the router multiplies it with at each, (tokens, 1)."""
        if path not in self.routes:
            return None
        own = routing.of(self.routes[path][1])
        weights = own.weights[own.sequence, own.place]
        tokens, given = self.routed.get(path, (0, 0.0))
        self.routed[path] = tokens + len(own.rows), given + float(weights.sum())
        return weights

    def _clipped(self, gradient: Tensor) -> Tensor:
        shares = clipping(gradient, self.clip)
        return gradient if shares is None else gradient * shares
