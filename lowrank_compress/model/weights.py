"""Every weight as (out, in): the one place that knows how modules store and fuse their matrices.

`read` and `place` take a weight as its module stores it, `bias` and `place_bias` a bias. All four work on any device,
the meta device included, and keep the dtype of what they read.
"""

from __future__ import annotations

from typing import NoReturn

import torch

from lowrank_compress.arch.targets import Rows, Target
from lowrank_compress.errors import CheckpointError


def read(weight: torch.Tensor, target: Target) -> torch.Tensor:
    """Return the matrix of `target`, shape ``target.shape`` = (out, in), from its module's stored weight.

    The module computes ``x @ read(weight, target).T`` (plus bias) in the output columns ``target.view.rows``. The
    result may share memory with `weight`.

    Raises
    ------
    CheckpointError
        `weight` does not have the shape of the target's module.
    """
    return _part(_oriented(weight, target), target.view.rows).reshape(target.shape)


def place(weight: torch.Tensor, target: Target, new: torch.Tensor) -> torch.Tensor:
    """Write `new`, (out, in), over the matrix of `target` in its module's stored weight, and return that weight.

    The inverse of `read`: the other parts of a fused weight stay, `new` is cast to the dtype of `weight`.

    Raises
    ------
    CheckpointError
        `weight` does not have the shape of the target's module, or `new` not that of the target.
    """
    _expect(new, target.shape, target.name)
    with torch.no_grad():
        part = _part(_oriented(weight, target), target.view.rows)
        part.copy_(new.reshape(part.shape))
    return weight


def bias(stored: torch.Tensor, target: Target) -> torch.Tensor:
    """Return the part of its module's bias that belongs to `target`, shape (out,).

    Raises
    ------
    CheckpointError
        `stored` does not have the shape of the module's bias.
    """
    _expect(stored, (target.view.rows.total,), target.bias or target.module)
    return _part(stored, target.view.rows).reshape(target.view.rows.size)


def place_bias(stored: torch.Tensor, target: Target, new: torch.Tensor) -> torch.Tensor:
    """Write `new`, (out,), over the part of its module's bias that belongs to `target`, and return that bias.

    Raises
    ------
    CheckpointError
        `stored` does not have the shape of the module's bias, or `new` not that of the target's part.
    """
    _expect(stored, (target.view.rows.total,), target.bias or target.module)
    _expect(new, (target.view.rows.size,), target.name)
    with torch.no_grad():
        part = _part(stored, target.view.rows)
        part.copy_(new.reshape(part.shape))
    return stored


def _oriented(weight: torch.Tensor, target: Target) -> torch.Tensor:
    """Return a view of all rows of the stored weight, or of those of the target's expert, as (out, in)."""
    view = target.view
    if view.expert is not None:
        if weight.ndim != 3 or view.expert >= len(weight):
            _refuse(weight, f"(more than {view.expert} experts, …)", target.parameter)
        weight = weight[view.expert]
    whole = (view.rows.total, target.shape[1])
    _expect(weight, whole[::-1] if view.transposed else whole, target.parameter)
    return weight.T if view.transposed else weight


def _part(tensor: torch.Tensor, rows: Rows) -> torch.Tensor:
    """Return a view (groups, length, …) of the selected rows of the leading dimension."""
    return tensor.unflatten(0, (rows.groups, rows.stride)).narrow(1, rows.offset, rows.length)


def _expect(tensor: torch.Tensor, shape: tuple[int, ...], name: str) -> None:
    if tuple(tensor.shape) != shape:
        _refuse(tensor, str(shape), name)


def _refuse(tensor: torch.Tensor, expected: str, name: str) -> NoReturn:
    raise CheckpointError(
        f"A tensor for {name} has shape {tuple(tensor.shape)}; expected {expected}. "
        "The weights do not belong to the model that was resolved."
    )
