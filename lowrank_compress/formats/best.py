"""The better of several formats, matrix by matrix: what "auto" storage is."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from lowrank_compress.formats.spec import Encoded, Format, Product, Shape


class Best(Format):
    """Planned at the cost of the cheapest format; each may then have the largest rank that costs no more.

    The one with the least metric loss is taken, rounding to the stored dtype included.

    Parameters
    ----------
    members
        Formats whose one parameter is a rank, the one that is tried first in front.
    """

    parameters = ("rank",)

    def __init__(self, name: str, help: str, *members: Format) -> None:
        self.name, self.help, self.members = name, help, members

    def grid(self, shape: Shape, multiple: int) -> np.ndarray:
        """The ranks of the first."""
        return self.members[0].grid(shape, multiple)

    def cost(self, shape: Shape, parameters: np.ndarray) -> np.ndarray:
        """That of the cheapest."""
        return np.minimum.reduce([member.cost(shape, parameters) for member in self.members])

    def indices(self, shape: Shape, parameters: np.ndarray) -> np.ndarray:
        """The most that it may be."""
        return np.maximum.reduce([member.indices(shape, parameters) for member in self.members])

    def losses(self, tail: np.ndarray, parameters: np.ndarray) -> np.ndarray:
        """That of the best approximation of the rank."""
        return tail[parameters[:, 0]]

    def rank(self, parameters: tuple[int, ...]) -> int:
        """It is the parameter; where the basis has more, more may be used."""
        return parameters[0]

    def encode(self, product: Product, parameters: tuple[int, ...]) -> Encoded:
        """Encode in each format and take the best."""
        ranks = self._ranks(product, parameters[0])
        # Ranks are nested: the factors of a smaller one are leading parts of a larger one's.
        product = product.up_to(max(ranks.values()))
        tail = product.projector.tail()
        best, least = None, math.inf
        for member, rank in ranks.items():
            loss = float(tail[rank])
            if best is not None and loss >= least:
                continue
            part = member.encode(product, (rank,))
            if len(ranks) > 1:
                left, right = product.factors(rank)
                loss += product.rounding_loss(member.rebuild(part, product.precise) - left @ right)
            if best is None or loss < least:
                best, least = part, loss
        assert best is not None
        return best

    def _ranks(self, product: Product, rank: int) -> dict[Format, int]:
        """The largest rank of each format at the cost of the cheapest one at `rank`; those that have none are out."""
        shape = product.shape
        count = int(self.cost(shape, np.array([[rank]], dtype=np.int64))[0])
        multiple = product.multiple if rank % product.multiple == 0 else 1  # 1: edited by hand
        found = {}
        for member in self.members:
            grid = member.grid(shape, multiple)
            fitting = grid[(member.cost(shape, grid) <= count) & (grid[:, 0] <= product.kept)]
            if len(fitting):
                found[member] = int(fitting[-1, 0])
        return found

    def rebuild(self, part: Encoded, dtype: torch.dtype) -> Tensor:
        """As the format does that was taken."""
        return next(member for member in self.members if member.name == part.format).rebuild(part, dtype)

    def approximate(self, product: Product, parameters: tuple[int, ...]) -> Tensor:
        """The best approximation of the rank."""
        left, right = product.exact(parameters[0])
        return left @ right
