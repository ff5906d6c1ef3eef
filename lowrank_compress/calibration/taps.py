"""Hooks that let every claimed module of a block add what it sees to the block's moments."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lowrank_compress.arch.resolve import Target
from lowrank_compress.calibration.moments import Moments, Seen
from lowrank_compress.errors import NumericsError
from lowrank_compress.model import weights
from lowrank_compress.model.replay import Batch
from lowrank_compress.model.skeleton import Skeleton


@contextmanager
def tapped(skeleton: Skeleton, index: int, moments: Moments | None, batch: Batch, clip: float | None) -> Iterator[None]:
    """Let every claimed module of a block add what it sees to `moments` while inside."""
    handles = []
    if moments is not None:
        for path, targets in skeleton.resolved.modules().items():
            if targets[0].block == index:
                module = skeleton.model.get_submodule(path)
                handles.append(module.register_forward_hook(_tap(targets, moments, batch, clip)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _tap(targets: tuple[Target, ...], moments: Moments, batch: Batch, clip: float | None):
    """Build a forward hook that measures a module now, and its output's gradient when that is known."""
    shape = batch.ids.shape
    mask = None if batch.mask is None else batch.mask.bool()[..., None]

    def measured(values: Tensor, device: torch.device) -> Tensor:
        values = values.detach().reshape(*shape, -1)
        return values if mask is None else values.masked_fill(~mask.to(device), 0)

    def hook(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        x = measured(args[0], out.device)
        stored_bias: Tensor | None = getattr(module, "bias", None)
        y = out.detach() if stored_bias is None else out.detach() - stored_bias
        y = measured(y, out.device)
        z = y if stored_bias is None else measured(out, out.device)
        rows = {target.name: target.rows.index().to(out.device) for target in targets} if len(targets) > 1 else {}

        def add(gradient: Tensor | None) -> None:
            for target in targets:
                index = rows.get(target.name)
                part = y if index is None else y[..., index]
                biased = part if z is y else z if index is None else z[..., index]
                g = None if gradient is None else gradient if index is None else gradient[..., index]
                weight = weights.read(module.get_parameter("weight").detach(), target)
                moments.add(target, Seen(x, part, biased, g, weight, target.heads), gradient=gradient is not None)

        def on_gradient(gradient: Tensor) -> None:
            if not torch.isfinite(gradient).all():
                raise NumericsError(
                    f"The gradient at {targets[0].module} is NaN or infinite on the calibration data. Check the "
                    "checkpoint, or calibrate in float32."
                )
            add(clipped(measured(gradient, gradient.device), clip))

        add(None)
        if out.requires_grad:
            out.register_hook(on_gradient)

    return hook


def clipped(g: Tensor, clip: float | None) -> Tensor:
    """Scale rows of g, (…, out), whose norm exceeds `clip` × the mean norm of the non-zero rows down to that norm."""
    if clip is None:
        return g
    norms = g.norm(dim=-1, keepdim=True)
    nonzero = norms[norms > 0]
    if nonzero.numel() == 0:
        return g
    limit = clip * nonzero.mean()
    return torch.where(norms > limit, g * (limit / norms.clamp_min(torch.finfo(g.dtype).tiny)), g)
