"""Low-rank matrices as pairs of factors while they are trained, and in their own formats before and after.

The matrices of rank r are one set, whichever format stores them; what differs is how a gradient step moves in it. Of a
pair whose factors have the same singular values neither side moves much faster than the other (balanced factors: Tu et
al., Low-rank Solutions of Linear Matrix Equations via Procrustes Flow, ICML 2016, section 2), which the identity among
a pivot's coefficients would prevent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowrank_compress.linalg.pivot import pivot
from lowrank_compress.model.casting import cast, require_finite
from lowrank_compress.shipped.formats.base import INDEX_DTYPE, Part
from lowrank_compress.shipped.formats.pair import Pair
from lowrank_compress.shipped.formats.table import FORMATS
from lowrank_compress.shipped.linear import CompressedLinear

Entry = Mapping[str, Any]
"""Of a module in `quantization_config.modules`, or of one of its parts."""


@dataclass(frozen=True)
class Factors:
    """A product A·B, as formats take it for encoding: A (m, r), B (r, n), r the rank that they are asked for."""

    left: Tensor
    right: Tensor

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """Return A and B."""
        return self.left, self.right

    def interpolated(self, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return indices, ascending, of r rows, these rows, and the coefficients of the others in them."""
        found = pivot(self.left, self.right)
        return found.index, found.pivots, found.coefficients


def is_low_rank(part: Entry) -> bool:
    """Whether a part's format holds every matrix of its rank, and can be trained as a pair."""
    return FORMATS[part["format"]].parameters == ("rank",)


def balanced(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factor a matrix (m, n) of rank r at most: A (m, r) and B (r, n), float64, with the same singular values."""
    left, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
    root = values[:rank].sqrt()
    return left[:, :rank] * root, root[:, None] * right[:rank]


@torch.no_grad()
def paired(layer: CompressedLinear, entry: Entry) -> CompressedLinear:
    """Make a layer that computes the same, with a balanced pair for every low-rank part; other parts stay."""
    parts = [
        {"rows": part["rows"], "format": Pair.format, "rank": part["rank"]} if is_low_rank(part) else part
        for part in entry["parts"]
    ]
    like = _inner(layer)
    made = CompressedLinear(**{**entry, "parts": parts}, stock=layer.stock, device=like.device, dtype=like.dtype)
    state, rows = layer.state_dict(), []
    for old, new, described, own in zip(layer.parts, made.parts, entry["parts"], _split(layer), strict=True):
        if is_low_rank(described):
            left, right = balanced(_matrix(layer, old, own), new.width)
            rows.append(right)
            state = {name: tensor for name, tensor in state.items() if name not in _names(old)}
            state[f"{new.outer}.weight"] = left
        else:
            rows.append(own)
    made.load_state_dict(state | {"lr_in.weight": torch.cat([row.to(like.dtype) for row in rows])})
    return made.train(layer.training)


@torch.no_grad()
def stored(layer: CompressedLinear, entry: Entry, dtype: torch.dtype, path: str) -> dict[str, Tensor]:
    """Put a layer that `paired` made into the formats of its entry: tensors by their leaf names, on the CPU.

    Parameters
    ----------
    dtype
        In which they will be stored.
    path
        Of the layer, for messages.

    Raises
    ------
    NumericsError
        A factor is not finite, or beyond the dtype.
    """
    state, rows = layer.state_dict(), []
    for part, described, own in zip(layer.parts, entry["parts"], _split(layer), strict=True):
        if not is_low_rank(described):
            rows.append(own)
            continue
        left = state.pop(f"{part.outer}.weight")
        require_finite(left, f"{path}.{part.outer}.weight")
        require_finite(own, f"{path}.lr_in.weight")
        product = Factors(left.double().cpu(), own.double().cpu())
        found = dict(FORMATS[described["format"]].encode(product, int(described["rank"])))
        rows.append(found.pop("lr_in.weight").to(own))
        for leaf, tensor in found.items():
            first, dot, below = leaf.partition(".")
            state[f"{first}{part.suffix}{dot}{below}"] = tensor
    state["lr_in.weight"] = torch.cat(rows)
    return {
        name: cast(tensor, dtype, f"{path}.{name}").cpu()
        if tensor.is_floating_point()
        else tensor.cpu().to(INDEX_DTYPE)
        for name, tensor in state.items()
    }


def _inner(layer: CompressedLinear) -> Tensor:
    return layer.lr_in.get_parameter("weight")


def _split(layer: CompressedLinear) -> tuple[Tensor, ...]:
    """Cut ``lr_in`` into the rows of its parts."""
    return _inner(layer).split([part.width for part in layer.parts])


def _matrix(layer: CompressedLinear, part: Part, inner: Tensor) -> Tensor:
    """Multiply out the matrix (rows, in) of a part, in float64; `inner` are its rows of ``lr_in``."""
    emitted = torch.cat(part.emitted_rows(layer, inner.double()))
    return torch.empty_like(emitted).index_copy_(0, part.order(layer, emitted.device), emitted)


def _names(part: Part) -> set[str]:
    """Names of the tensors that are a part's own."""
    return {f"{name}.weight" for name in part.factors()} | set(part.buffers(torch.device("meta")))
