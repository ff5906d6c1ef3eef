"""Hooks that let every claimed module of a block add what it sees to the block's moments."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lowrank_compress.arch.targets import Target
from lowrank_compress.calibration.experts import Routing
from lowrank_compress.calibration.moments import Moments
from lowrank_compress.calibration.sums import Seen
from lowrank_compress.errors import NumericsError
from lowrank_compress.model import weights
from lowrank_compress.model.skeleton import Skeleton
from lowrank_compress.model.walk.batch import Batch


@contextmanager
def hooked(
    skeleton: Skeleton,
    index: int,
    moments: Moments | None,
    batch: Batch,
    clip: float | None,
    weighed_by: Skeleton | None = None,
) -> Iterator[None]:
    """Let every claimed module of a block add what it sees to `moments` while inside.

    δ = g W is taken with the module's own W; or with that of another model, whose block must be in memory too.
    """
    handles = []
    if moments is not None:
        routing = None
        for path, targets in skeleton.resolved.modules_of(index).items():
            module = skeleton.model.get_submodule(path)
            own = None if weighed_by is None else partial(weighed_by.parameter, f"{path}.weight")
            if targets[0].expert is not None and routing is None:
                routing = Routing(batch)
                experts = skeleton.model.get_submodule(path.rsplit(".", 2)[0])
                handles.append(routing.watch(experts))
                if moments.compares:
                    handles.append(_compare(experts, moments, batch, routing))
            handles += _hook(module, targets, moments, batch, clip, own, routing)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _compare(experts: nn.Module, moments: Moments, batch: Batch, routing: Routing) -> RemovableHandle:
    """Compare all experts on all real tokens of a batch."""

    def before(module: Any, args: tuple[Tensor, ...]) -> None:
        x, routing.aside = args[0].detach(), True
        moments.compare(list(module), x if batch.mask is None else x[batch.mask.bool().flatten().to(x.device)])
        routing.aside = False

    return experts.register_forward_pre_hook(before)


def _hook(
    module: nn.Module,
    targets: tuple[Target, ...],
    moments: Moments,
    batch: Batch,
    clip: float | None,
    weighed_by: Callable[[], Tensor] | None = None,
    routing: Routing | None = None,
):
    """Hook a module: measure what it sees now, and the gradient of its output when that is known.

    The gradient of a module's own input is δ = g W, which autograd computes anyway; only where several targets share a
    fused weight, or W is another module's, each has to multiply by its own part.

    Returns
    -------
    list
        The handles of the hooks.
    """
    shape = batch.ids.shape
    mask = None if batch.mask is None else batch.mask.bool()[..., None]
    alone = len(targets) == 1 and moments.wants(targets[0], "in_fisher") and weighed_by is None
    weight = weighed_by or partial(module.get_parameter, "weight")
    expert = targets[0].expert

    def measured(values: Tensor, device: torch.device) -> Tensor:
        if routing is not None and expert is not None:
            return routing.of(expert).packed(values.detach())
        values = values.detach().reshape(*shape, -1)
        return values if mask is None else values.masked_fill(~mask.to(device), 0)

    def before(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        # Others may read the same tensor, and its gradient would be the sum of all of theirs.
        return (args[0].view_as(args[0]), *args[1:])

    def after(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        if routing is not None and routing.aside:
            return
        x = measured(args[0], out.device)
        stored_bias: Tensor | None = getattr(module, "bias", None)
        y = out.detach() if stored_bias is None else out.detach() - stored_bias
        y = measured(y, out.device)
        z = y if stored_bias is None else measured(out, out.device)
        rows = {target.name: target.view.rows.index().to(out.device) for target in targets} if len(targets) > 1 else {}

        def add(gradient: Tensor | None, delta: Tensor | None = None) -> None:
            for target in targets:
                index = rows.get(target.name)
                part = y if index is None else y[..., index]
                biased = part if z is y else z if index is None else z[..., index]
                g = None if gradient is None else gradient if index is None else gradient[..., index]
                inner = delta
                if g is not None and inner is None and moments.wants(target, "in_fisher"):
                    inner = g @ weights.read(weight().detach(), target)
                own = None if routing is None or expert is None else routing.of(expert)
                moments.add(
                    target,
                    Seen(x, part, biased, g, inner, target.heads, batch.first, own),
                    gradient=gradient is not None,
                )

        waiting: list[tuple[Tensor, Tensor | None]] = []

        def on_gradient(gradient: Tensor) -> None:
            if not torch.isfinite(gradient).all():
                raise NumericsError(
                    f"The gradient at {targets[0].module} is NaN or infinite on the calibration data. Check the "
                    "checkpoint, or calibrate in float32."
                )
            g = measured(gradient, gradient.device)
            shares = clipping(g, clip)
            g = g if shares is None else g * shares
            if alone:
                waiting.append((g, shares))
            else:
                add(g)

        def on_inner_gradient(gradient: Tensor) -> None:
            g, shares = waiting.pop()
            delta = measured(gradient, gradient.device)
            add(g, delta if shares is None else delta * shares)

        add(None)
        if out.requires_grad:
            out.register_hook(on_gradient)
            if alone:
                args[0].register_hook(on_inner_gradient)

    handles = [module.register_forward_hook(after)]
    return [*handles, module.register_forward_pre_hook(before)] if alone else handles


def clipping(g: Tensor, clip: float | None) -> Tensor | None:
    """What to multiply rows of g, (…, out), with so that none is too long: (…, 1), or None where nothing can be.

    A row whose norm exceeds `clip` × the mean norm of the non-zero rows is scaled down to that norm.
    """
    if clip is None:
        return None
    norms = g.norm(dim=-1, keepdim=True)
    nonzero = norms[norms > 0]
    if nonzero.numel() == 0:
        return None
    limit = clip * nonzero.mean()
    return torch.where(norms > limit, limit / norms.clamp_min(torch.finfo(g.dtype).tiny), 1.0)
