"""Rounding to a storage dtype, which must lose digits only."""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank_compress.errors import NumericsError


def cast(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Round a floating-point tensor; leave others.

    Parameters
    ----------
    tensor, dtype
        What, and to what.
    name
        Of the tensor, for the message.

    Raises
    ------
    NumericsError
        A value is beyond the largest of `dtype`.
    """
    if not tensor.is_floating_point() or tensor.dtype == dtype:
        return tensor
    rounded = tensor.to(dtype)
    narrower = torch.finfo(dtype).max < torch.finfo(tensor.dtype).max
    if narrower and not _is_finite(rounded):
        short = str(dtype).removeprefix("torch.")
        raise NumericsError(
            f"{name} has the value {float(tensor.abs().max()):.6g}, beyond {torch.finfo(dtype).max:.6g}, the largest "
            f"of {short}. Pass --dtype bfloat16 or float32; where config.json itself says {short}, change its dtype."
        )
    return rounded


def require_finite(tensor: Tensor, name: str) -> None:
    """Refuse a tensor that is to be written, if it has NaN or infinite elements.

    Raises
    ------
    NumericsError
        It has.
    """
    if tensor.is_floating_point() and not _is_finite(tensor):
        bad = int((~torch.isfinite(tensor)).sum())
        short = str(tensor.dtype).removeprefix("torch.")
        raise NumericsError(
            f"{name} would be written with {bad} NaN or infinite elements of {tensor.numel()} in {short}. Where the "
            "values are beyond that dtype, choose a wider one with --dtype."
        )


def _is_finite(tensor: Tensor) -> bool:
    # The extremes show whether any is not finite, and are found thirty times as fast as the truth about each.
    return tensor.numel() == 0 or all(bool(torch.isfinite(extreme)) for extreme in tensor.aminmax())
