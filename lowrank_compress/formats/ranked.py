"""What formats have in common whose one parameter is a rank."""

from __future__ import annotations

from abc import abstractmethod

import numpy as np
from torch import Tensor

from lowrank_compress.formats.spec import Encoded, Format, Product, Shape
from lowrank_compress.linalg.weighted import factors


class Ranked(Format):
    """A format that stores the best approximation of a rank, without a loss of its own but rounding."""

    parameters = ("rank",)

    @abstractmethod
    def elements(self, shape: Shape, ranks: np.ndarray) -> np.ndarray:
        """Return the stored elements at ranks, int64."""

    @abstractmethod
    def store(self, left: Tensor, right: Tensor) -> Encoded:
        """Store A B, A of shape (out, r) and B of shape (r, in), in the factors' dtype or a better one."""

    def grid(self, shape: Shape, multiple: int) -> np.ndarray:
        """All ranks below the matrix's own."""
        return np.arange(multiple, min(shape), multiple, dtype=np.int64)[:, None]

    def cost(self, shape: Shape, parameters: np.ndarray) -> np.ndarray:
        """See `elements`."""
        return self.elements(shape, parameters[:, 0])

    def losses(self, tail: np.ndarray, parameters: np.ndarray) -> np.ndarray:
        """That of the best approximation."""
        return tail[parameters[:, 0]]

    def rank(self, parameters: tuple[int, ...]) -> int:
        """It is the parameter."""
        return parameters[0]

    def encode(self, product: Product, parameters: tuple[int, ...]) -> Encoded:
        """Factor, store and round."""
        return self.store(*product.factors(parameters[0])).cast(product.dtype, product.name)

    def approximate(self, product: Product, parameters: tuple[int, ...]) -> Tensor:
        """The best approximation of the rank."""
        left, right = factors(product.weight, product.projector, parameters[0])
        return left @ right
