"""Linear modules of a model, compressed or not: found, described, made and put in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .linear import CompressedLinear, Stock
from .packed import PackedLinear


def find(model: nn.Module, path: str) -> tuple[str, Any]:
    """Look up the module that a saved path means: its path here, and itself.

    A model with a head and its base model differ by ``base_model_prefix``, so it is looked up as it is, without and
    with that prefix.

    Raises
    ------
    ValueError
        There is none.
    """
    prefix = getattr(model, "base_model_prefix", "")
    for name in (path, path.removeprefix(f"{prefix}."), f"{prefix}.{path}"):
        try:
            return name, model.get_submodule(name)
        except AttributeError:
            continue
    raise ValueError(
        f"the low-rank config names the module {path}, which {type(model).__name__} does not have"
        + (f", with or without the prefix {prefix!r}" if prefix else "")
    )


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of another."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def stock_of(path: str, module: nn.Module) -> Stock:
    """Say what a linear layer, compressed or not, is in the stock model.

    Raises
    ------
    ValueError
        It is no linear layer.
    """
    if isinstance(module, CompressedLinear):
        return module.stock
    if isinstance(module, nn.Linear | PackedLinear):
        own = Stock(module.out_features, module.in_features, module.bias is not None, False)
    elif isinstance(module, Conv1D):
        own = Stock(module.weight.shape[1], module.weight.shape[0], True, True)
    else:
        raise ValueError(f"{path} of the low-rank config is a {type(module).__name__}, expected nn.Linear or Conv1D")
    return getattr(module, "lr_stock", own)


def shape_of(module: Any) -> tuple[int, int]:
    """Return (out, in) of a linear layer, compressed or not."""
    if isinstance(module, Conv1D):
        return module.weight.shape[1], module.weight.shape[0]
    return module.out_features, module.in_features


def dense_module(stock: Stock, like: Tensor) -> Any:
    """Make an uninitialised ``nn.Linear`` or ``Conv1D`` of that shape, with the device and dtype of `like`."""
    if stock.conv1d:
        with torch.device("meta"):
            conv = Conv1D(stock.out_features, stock.in_features).to(like.dtype)
        return conv if like.device.type == "meta" else conv.to_empty(device=like.device)
    # An expert may have lost all its hidden units; of nothing torch makes no layer without a warning.
    sizes = max(stock.in_features, 1), max(stock.out_features, 1)
    linear: Any = nn.utils.skip_init(nn.Linear, *sizes, bias=stock.bias, device=like.device, dtype=like.dtype)
    if 0 in (stock.in_features, stock.out_features):
        linear.in_features, linear.out_features = stock.in_features, stock.out_features
        linear.weight = nn.Parameter(linear.weight.new_empty(stock.out_features, stock.in_features))
        linear.bias = nn.Parameter(linear.bias.new_empty(stock.out_features)) if stock.bias else None
    return linear
