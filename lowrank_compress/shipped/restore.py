"""Stock modules in the place of compressed ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .attention import CompressedAttention
from .experts import SeparateExperts
from .latent import LatentAttention
from .linear import CompressedLinear, Stock
from .modules import dense_module, put, stock_of
from .packed import PackedLinear


@torch.no_grad()
def restore_modules(model: nn.Module) -> list[str]:
    """Put stock modules in the place of all that `swap_modules` replaced, in `model` or a part of it.

    A module that is smaller than the stock one is padded with zeros, where its attention says or else at its end,
    which leaves the function of an attention or MLP unchanged because its neighbours are padded alike. An attention
    that caches latents has its keys and values exact again where it keeps a window of them, and else multiplied out.
    Experts stay modules of their own (see `join_experts`), those that were merged with the weights of one another.

    Returns
    -------
    list of str
        Names of the modules whose tensors are new.

    Raises
    ------
    ValueError
        If a module has a bias that the stock one has no place for, or is not in memory.
    """
    attentions = [(name, module) for name, module in model.named_modules() if isinstance(module, CompressedAttention)]
    places = {
        f"{name}.{leaf}" if name else leaf: rows
        for name, attention in attentions
        for leaf, rows in attention.stock_rows().items()
    }
    rebuilt = {
        f"{name}.{leaf}" if name else leaf: matrix
        for name, attention in attentions
        if isinstance(attention, LatentAttention) and not attention.lr_remembered.window
        for leaf, matrix in attention.stock_products().items()
    }
    found: list[tuple[str, Any, Stock]] = []
    inner: set[int] = set()
    for name, old in model.named_modules():
        if isinstance(old, CompressedLinear):
            inner |= {id(child) for child in old.children()}
        packed = isinstance(old, PackedLinear) and id(old) not in inner
        if not (isinstance(old, CompressedLinear) or packed or hasattr(old, "lr_stock") or name in places):
            continue
        stock = stock_of(name, old)
        if old.bias is not None and not stock.bias:
            raise ValueError(f"{name} has a bias of its own, which a stock {type(model).__name__} has no place for")
        if any(tensor.device.type == "meta" for tensor in (*old.parameters(), *old.buffers())):
            raise ValueError(f"the weights of {name} are not in memory: load the model without offloading")
        found.append((name, old, stock))
    for name, old, stock in found:
        if isinstance(old, CompressedLinear):
            weight = old.dense_weight()
        else:
            weight = old.weight.T if stock.conv1d else old.weight
        kept = torch.arange(stock.out_features).view(stock.parts, -1)[:, : len(weight) // stock.parts].flatten()
        rows = places.get(name, kept).to(weight.device)
        weight = weight.unflatten(1, (stock.groups, weight.shape[1] // stock.groups))
        whole = weight.new_zeros(stock.out_features, stock.groups, stock.in_features // stock.groups)
        whole[rows, :, : weight.shape[2]] = weight
        if name in rebuilt:
            whole[rows] += rebuilt[name].to(whole)[:, None]
        new = dense_module(stock, weight).train(old.training)
        (new.weight.T if stock.conv1d else new.weight).copy_(whole.flatten(1))
        if stock.bias:
            new.bias.zero_()
            if old.bias is not None:
                new.bias[rows] = old.bias
        put(model, name, new)
    for module in model.modules():
        if isinstance(module, SeparateExperts):
            module.unmark()
            module.part()
    for _, attention in attentions:
        if isinstance(attention, LatentAttention):
            attention.forget()
        attention.__dict__.pop("lr_heads")
        attention._buffers.pop("lr_rotary", None)
        attention.__class__ = attention.lr_stock_class  # pyright: ignore[reportAttributeAccessIssue]
    return [name for name, _, _ in found]
