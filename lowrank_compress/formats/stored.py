"""A storage format of the table of those that layers compute with, for planning and encoding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from lowrank_compress.formats.spec import Encoded, Format, Product, Shape
from lowrank_compress.shipped.formats.base import Part


class Stored(Format):
    """What a class of parts says of costs and tensors, in arrays and in the dtype that will be stored."""

    def __init__(self, part: type[Part]) -> None:
        self.part = part
        self.name, self.help, self.parameters = part.format, part.help, part.parameters

    def grid(self, shape: Shape, multiple: int) -> np.ndarray:
        """That of the parts."""
        return np.array(self.part.grid(*shape, multiple), dtype=np.int64).reshape(-1, len(self.parameters))

    def cost(self, shape: Shape, parameters: np.ndarray) -> np.ndarray:
        """That of the parts."""
        return self.part.elements(*shape, *parameters.T)

    def indices(self, shape: Shape, parameters: np.ndarray) -> np.ndarray:
        """Those of the parts."""
        return self.part.indices(*shape, *parameters.T)

    def losses(self, tail: np.ndarray, parameters: np.ndarray) -> np.ndarray:
        """Those of the parts."""
        return self.part.losses(tail, *parameters.T)

    def rank(self, parameters: tuple[int, ...]) -> int:
        """That of the parts."""
        return self.part.basis_rank(*parameters)

    def encode(self, product: Product, parameters: tuple[int, ...]) -> Encoded:
        """Encode, and round."""
        others = dict(self.part.encode(product, *parameters))
        inner = others.pop("lr_in.weight")
        return Encoded(self.name, parameters, product.shape, inner, others).cast(product.dtype, product.name)

    def rebuild(self, part: Encoded, dtype: torch.dtype) -> Tensor:
        """Multiply out as the layer would."""
        stored = self.part(self.part.describe(*part.shape, *part.parameters), "")
        layer = cast(nn.Module, _Tensors(part.others))
        emitted = torch.cat(stored.emitted_rows(layer, part.inner.to(dtype)))
        if not stored.reorders:
            return emitted
        return torch.empty_like(emitted).index_copy_(0, stored.order(layer, emitted.device), emitted)

    def approximate(self, product: Product, parameters: tuple[int, ...]) -> Tensor:
        """The best approximation of the rank, where that is all there is to it."""
        if self.parameters != ("rank",):
            return super().approximate(product, parameters)
        left, right = product.exact(parameters[0])
        return left @ right


class _Tensors:
    """The parameters and buffers of a layer that is not there."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.get_parameter = self.get_buffer = tensors.__getitem__
