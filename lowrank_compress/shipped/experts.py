"""Experts with matrices of their own, in the place of a stock module that holds those of all of them in two tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .formats.base import INDEX_DTYPE
from .fusion import FUSED, ROLES, Fusion, Gating, fusion_of
from .modules import find, put


class Expert(nn.Module):
    """One expert, a gated MLP: ``lr_down(gating(lr_gating(x), lr_up(x)))``; of width 0 it gives zeros, or a bias.

    Each of the three is a linear layer, which may be compressed as any other. Their names are none that transformers
    would take for those of stored experts, and join to a tensor, or for a router, whose dtype is its own.
    """

    lr_gating: Any
    lr_up: Any
    lr_down: Any

    def __init__(self, width: int, size: int, gating: Gating, bias: bool, like: Tensor) -> None:
        super().__init__()
        shapes = dict(zip(ROLES, ((width, size), (width, size), (size, width)), strict=True))
        for role, (rows, columns) in shapes.items():
            linear = nn.utils.skip_init(nn.Linear, columns, rows, bias=bias, device=like.device, dtype=like.dtype)
            self.add_module(role, linear)
        self.gating = gating

    def hidden(self, x: Tensor) -> Tensor:
        """Map (tokens, size) to the hidden units, (tokens, width)."""
        return self.gating(self.lr_gating(x), self.lr_up(x))

    def forward(self, x: Tensor) -> Tensor:
        """Map (tokens, size) to (tokens, size)."""
        return self.lr_down(self.hidden(x))


class SeparateExperts(nn.ModuleList):
    """The experts of a block, each a module of its own, which may have a width, formats and ranks of its own.

    It is called as the stock module is, and computes what that does where `config._experts_implementation` is eager;
    to others it pays no heed. Experts that no token goes to are not run.

    Parameters
    ----------
    stock : nn.Module
        What it stands for; its weights are taken along unless they are on the meta device.
    fusion : Fusion
        How that holds them.

    Notes
    -----
    Where experts were merged, ``lr_leads`` (experts,), int32, says which expert stands for each, itself or another,
    whose tokens then go there; that other has no hidden units of its own.

    Once `marked`, it has empty buffers (0,) under the names of the stock tensors, which make a load by code that does
    not know this module fail with a size mismatch instead of starting from random weights.
    """

    lr_merged: int

    def __init__(self, stock: Any, fusion: Fusion) -> None:
        views = fusion.views({name: stock.get_parameter(name) for name in fusion.names})
        count, size, width = (down := views[f"{ROLES[2]}.weight"]).shape
        gating = Gating(stock, fusion)
        super().__init__(Expert(width, size, gating, fusion.biased, down) for _ in range(count))
        self.train(stock.training)
        self.fusion = fusion
        if down.device.type != "meta":
            with torch.no_grad():
                for leaf, several in views.items():
                    for expert, own in zip(self, several, strict=True):
                        expert.get_parameter(leaf).copy_(own)
        # No submodule: it has no memory and no place in any state.
        self.__dict__["stock"] = stock.to("meta")

    def mark(self) -> None:
        """Have the empty buffers."""
        like = next(self.parameters())
        for name in FUSED:
            self.register_buffer(name, torch.empty(0, device=like.device, dtype=like.dtype))

    def unmark(self) -> None:
        """Have no such buffers."""
        for name in FUSED:
            self._buffers.pop(name, None)

    def merge(self, count: int) -> None:
        """Have the buffer of what was merged; `count` are left, and which ones is loaded."""
        like = next(self.parameters())
        first = torch.arange(len(self), device=like.device, dtype=INDEX_DTYPE)
        self.register_buffer("lr_leads", first.clamp_max(count - 1))
        self.lr_merged = count

    @property
    def merged(self) -> bool:
        """Whether some experts stand for others."""
        return "lr_leads" in self._buffers

    def members(self, number: int) -> list[int]:
        """Return the experts that one stands for, itself among them; none of one that another stands for."""
        return (self.get_buffer("lr_leads") == number).nonzero().flatten().tolist() if self.merged else [number]

    def check(self, path: str) -> None:
        """Make sure that experts lead to such as stand for themselves: others would compute something else.

        Raises
        ------
        ValueError
            They do not.
        """
        leads = self.get_buffer("lr_leads")
        if leads.device.type == "meta" or type(leads) is not Tensor:
            return
        found = set(leads.tolist())
        known = all(0 <= lead < len(self) for lead in found)
        if not known or len(found) != self.lr_merged or any(int(leads[lead]) != lead for lead in found):
            raise ValueError(f"{path}.lr_leads does not name {self.lr_merged} experts, each its own: it is damaged")

    @torch.no_grad()
    def part(self) -> None:
        """Let all experts stand for themselves again, with the weights of those that stood for them."""
        if self.merged:
            experts = list(self)
            for number, lead in enumerate(self._buffers.pop("lr_leads").tolist()):  # pyright: ignore[reportOptionalMemberAccess]
                for leaf in self.fusion.leaves if lead != number else ():
                    experts[number].get_parameter(leaf).copy_(experts[lead].get_parameter(leaf))
            del self.lr_merged

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Sum what experts make of their tokens, times the router's weights: (tokens, size), as is `hidden_states`.

        `top_k_index` and `top_k_weights` are (tokens, experts a token).
        """
        out = torch.zeros_like(hidden_states)
        if self.merged:
            leads = self.get_buffer("lr_leads").long()
            here = top_k_index < len(self)
            top_k_index = torch.where(here, leads[top_k_index.clamp_max(len(self) - 1)], top_k_index)
        for number in top_k_index.unique().tolist():
            if number < len(self):  # others are experts of other processes
                tokens, places = routed(top_k_index, number)
                own = self[number](hidden_states[tokens]) * top_k_weights[tokens, places, None]
                out.index_add_(0, tokens, own.to(out.dtype))
        return out

    @torch.no_grad()
    def joined(self) -> nn.Module:
        """Return the stock module, with these experts' weights; all three layers of each must be stock again."""
        stock = self.__dict__["stock"]
        parts = {leaf: torch.stack([expert.get_parameter(leaf) for expert in self]) for leaf in self.fusion.leaves}
        for name in self.fusion.names:
            setattr(stock, name, nn.Parameter(self.fusion.joined(name, parts)))
        return stock.train(self.training)


def routed(top_k_index: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """Return which tokens go to an expert, ascending, and at which place of their choices it stands."""
    tokens, places = torch.where(top_k_index == number)
    return tokens, places


def separate(model: nn.Module, path: str) -> SeparateExperts:
    """Put `SeparateExperts` in the place of the stock experts at a path, unless they are there; return them.

    Raises
    ------
    ValueError
        There is something else.
    """
    name, old = find(model, path)
    if isinstance(old, SeparateExperts):
        return old
    if (fusion := fusion_of(old)) is None:
        raise ValueError(
            f"{path} is a {type(old).__name__}, expected experts whose gate, up and down can be told apart"
        )
    put(model, name, new := SeparateExperts(old, fusion))
    return new


def join_experts(model: nn.Module) -> None:
    """Put the stock modules in the place of all separate experts."""
    for name, module in list(model.named_modules()):
        if isinstance(module, SeparateExperts):
            put(model, name, module.joined())
