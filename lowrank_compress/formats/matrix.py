"""A matrix as a compressed model has it: read from its module, and written into it again in the format that it has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lowrank_compress.arch.targets import Rows, Target, View
from lowrank_compress.formats.spec import Encoded
from lowrank_compress.model import weights
from lowrank_compress.shipped.attention import CompressedAttention
from lowrank_compress.shipped.formats.latent import Rebuilt
from lowrank_compress.shipped.formats.table import FORMATS as PARTS
from lowrank_compress.shipped.linear import CompressedLinear
from lowrank_compress.shipped.modules import shape_of


@dataclass(frozen=True, eq=False)
class StoredMatrix:
    """A target's matrix in the module of a compressed model.

    Attributes
    ----------
    target
        The target with the shape and the view that it has there: it may have fewer rows or columns than stock.
    module
        A `CompressedLinear`, or a stock module that may be smaller.
    number
        Which part of the module it is.
    format, parameters
        As in a choice; "dense" for a stock module, too.
    """

    target: Target
    module: nn.Module
    number: int
    format: str
    parameters: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.target.shape

    @torch.no_grad()
    def weight(self) -> Tensor:
        """Multiply it out: (out, in) float64."""
        if isinstance(self.module, CompressedLinear):
            return weights.read(self.module.dense_weight(torch.float64), self.target).double()
        return weights.read(self.module.get_parameter("weight"), self.target).double()

    @torch.no_grad()
    def bias(self) -> Tensor | None:
        """Its part of the module's bias, (out,) float64; None where there is none."""
        stored = self.module.bias
        return None if stored is None else weights.bias(_tensor(stored), self.target).double()

    @torch.no_grad()
    def put(self, part: Encoded, bias: Tensor | None = None) -> dict[str, Tensor]:
        """Write the matrix, and its bias if one is given, into the module, as it will be stored.

        Returns
        -------
        dict
            The module's tensors that are others now, by their leaf names.
        """
        module, state = self.module, dict[str, Tensor]()
        if isinstance(module, CompressedLinear):
            inner = module.lr_in.get_parameter("weight").clone()
            start = sum(before.width for before in module.parts[: self.number])
            inner[start : start + len(part.inner)] = part.inner.to(inner)
            state["lr_in.weight"] = inner
            suffix = module.parts[self.number].suffix
            for leaf, tensor in part.others.items():
                first, dot, below = leaf.partition(".")
                name = f"{first}{suffix}{dot}{below}"
                like = module.state_dict()[name]
                state[name] = tensor.to(like.device, like.dtype)
        else:
            state["weight"] = weights.place(module.get_parameter("weight").clone(), self.target, part.inner)
        if bias is not None:
            state["bias"] = weights.place_bias(_tensor(module.bias).clone(), self.target, bias)
        module.load_state_dict(state, strict=False, assign=True)
        return state


def stored_matrices(
    model: nn.Module, modules: Mapping[str, Sequence[Target]], layout: Mapping[str, Any]
) -> dict[str, StoredMatrix]:
    """Find the matrices of targets in a compressed model, by the targets' names.

    Those in other modules, and those that attentions rebuild, are left out.

    Parameters
    ----------
    model
        The compressed model; nothing of it need be in memory.
    modules
        The targets by the path of their module, in the order of its parts.
    layout
        The checkpoint's ``quantization_config``.
    """
    found = {}
    for path, targets in modules.items():
        module = model.get_submodule(path)
        if not isinstance(module, CompressedLinear | nn.Linear | Conv1D) or any(
            t.view.expert is not None for t in targets
        ):
            continue
        parts = layout.get("modules", {}).get(path, {}).get("parts", [{"format": "dense"}] * len(targets))
        for number, (target, part) in enumerate(zip(_as_stored(model, module, targets), parts, strict=True)):
            if part["format"] == Rebuilt.format:
                continue
            parameters = tuple(int(part[name]) for name in PARTS[part["format"]].parameters)
            found[target.name] = StoredMatrix(target, module, number, part["format"], parameters)
    return found


def _as_stored(model: nn.Module, module: nn.Module, targets: Sequence[Target]) -> list[Target]:
    """Give targets the shapes and views that they have in a module."""
    rows, columns = shape_of(module)
    groups, offset = targets[0].view.rows.groups, 0
    made = []
    for target, size in zip(targets, _rows(model, module, targets, rows), strict=True):
        part = Rows(groups, rows // groups, offset, size // groups)
        view = View(part, transposed=isinstance(module, Conv1D))
        made.append(replace(target, shape=(size, columns), view=view))
        offset += part.length
    return made


def _rows(model: nn.Module, module: nn.Module, targets: Sequence[Target], rows: int) -> list[int]:
    """Count the rows of each part of a module."""
    if isinstance(module, CompressedLinear):
        return [part.rows for part in module.parts]
    stock = [target.shape[0] for target in targets]
    if sum(stock) == rows:
        return stock
    attention = model.get_submodule(targets[0].module.rpartition(".")[0])
    if isinstance(attention, CompressedAttention) and targets[0].role == "q" and len(targets) == 3:
        heads = attention.lr_heads
        return [heads.heads * heads.query_key, heads.kv_heads * heads.query_key, heads.kv_heads * heads.value]
    return [rows // len(targets)] * len(targets)


def _tensor(value: Any) -> Tensor:
    assert isinstance(value, Tensor)
    return value
