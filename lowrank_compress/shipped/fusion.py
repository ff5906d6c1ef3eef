"""How stock modules hold the matrices of all experts of a block together, and what they make of gate and up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

ROLES = ("lr_gating", "lr_up", "lr_down")
FUSED = ("gate_up_proj", "down_proj")


class Fusion(NamedTuple):
    """How a stock module has the matrices, and biases, of all its experts in a few tensors.

    These are ``gate_up_proj`` and ``down_proj``, as (experts, out, in), and where there are biases
    ``gate_up_proj_bias`` and ``down_proj_bias``, (experts, out); all of gate comes before all of up.

    Parameters
    ----------
    transposed
        Matrices lie as (experts, in, out).
    interleaved
        An output of gate and one of up alternate instead.
    biased
        There are biases.
    """

    transposed: bool
    interleaved: bool
    biased: bool

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the stock tensors."""
        return (*FUSED, *(f"{name}_bias" for name in FUSED)) if self.biased else FUSED

    @property
    def leaves(self) -> tuple[str, ...]:
        """The names of an expert's own tensors, below it."""
        return tuple(f"{role}.{kind}" for kind in ("weight", "bias")[: 1 + self.biased] for role in ROLES)

    def views(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Find the matrices of experts, (experts, out, in), and biases, (experts, out), in stock tensors by name.

        Parameters
        ----------
        tensors
            All, or some; of all experts, or of some.

        Returns
        -------
        dict
            `leaves` -> views, which may be written to.
        """
        found = {}
        for name, tensor in tensors.items():
            kind = "bias" if name.endswith("_bias") else "weight"
            rows = tensor.mT if self.transposed and kind == "weight" else tensor
            if name.startswith(FUSED[0]):
                gate, up = (rows[:, ::2], rows[:, 1::2]) if self.interleaved else rows.chunk(2, 1)
                found |= {f"{ROLES[0]}.{kind}": gate, f"{ROLES[1]}.{kind}": up}
            else:
                found[f"{ROLES[2]}.{kind}"] = rows
        return found

    def source(self, leaf: str) -> str:
        """Name the stock tensor that one of the `leaves` is in."""
        role, _, kind = leaf.partition(".")
        return (FUSED[1] if role == ROLES[2] else FUSED[0]) + ("_bias" if kind == "bias" else "")

    @torch.no_grad()
    def joined(self, name: str, parts: Mapping[str, Tensor]) -> Tensor:
        """Make the stock tensor of a name of what `views` would find in it."""
        own = [parts[leaf] for leaf in self.leaves if self.source(leaf) == name]
        count, rows, *columns = own[0].shape
        shape = [rows * len(own), *columns]
        whole = own[0].new_empty(count, *(shape[::-1] if self.transposed else shape))
        for leaf, view in self.views({name: whole}).items():
            view.copy_(parts[leaf])
        return whole


def fusion_of(stock: nn.Module) -> Fusion | None:
    """Tell how a stock module holds gated experts; None where it is nothing of the kind."""
    told = {"has_gate": True, "has_post_expert_norm": False}
    gate_up, down = (getattr(stock, name, None) for name in FUSED)
    shaped = isinstance(gate_up, Tensor) and isinstance(down, Tensor) and gate_up.ndim == down.ndim == 3
    gated = hasattr(stock, "act_fn") or hasattr(stock, "_apply_gate")
    if not shaped or not gated or any(getattr(stock, name, value) != value for name, value in told.items()):
        return None
    switches = {"is_transposed": False, "is_concatenated": True, "has_bias": False}
    transposed, concatenated, biased = (bool(getattr(stock, name, usual)) for name, usual in switches.items())
    return Fusion(transposed, not concatenated, biased)


class Gating:
    """What a family's stock module makes of the outputs of gate and up: its hidden units.

    Parameters
    ----------
    stock
        The module, of which no weight is needed.
    """

    def __init__(self, stock: Any, fusion: Fusion) -> None:
        self.stock, self.interleaved = stock, fusion.interleaved
        # Modules without one of their own have transformers', a plain product, which needs no copy of both.
        self.plain = hasattr(stock, "act_fn") and _name(stock) in ("", "_default_apply_gate")

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        """Map both, (tokens, width), to (tokens, width)."""
        if self.plain:
            return self.stock.act_fn(gate) * up
        both = torch.stack([gate, up], -1).flatten(-2) if self.interleaved else torch.cat([gate, up], -1)
        return self.stock._apply_gate(both)


def _name(stock: Any) -> str:
    return getattr(getattr(type(stock), "_apply_gate", None), "__name__", "")
