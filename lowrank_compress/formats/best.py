"""The better of several formats, matrix by matrix: what "auto" storage is."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from lowrank_compress.errors import InputError
from lowrank_compress.formats.ranked import Ranked
from lowrank_compress.formats.spec import Encoded, Product, Shape


class Best(Ranked):
    """Planned at the cost of the cheaper format; each may then have the largest rank that costs no more.

    The one with the smaller metric loss is taken, rounding to the stored dtype included.

    Parameters
    ----------
    members
        The formats, the one that is tried first in front.
    """

    def __init__(self, name: str, help: str, *members: Ranked) -> None:
        self.name, self.help, self.members = name, help, members

    def elements(self, shape: Shape, ranks: np.ndarray) -> np.ndarray:
        """Those of the cheapest."""
        return np.minimum.reduce([member.elements(shape, ranks) for member in self.members])

    def indices(self, shape: Shape, parameters: np.ndarray) -> np.ndarray:
        """The most that it may be."""
        return np.maximum.reduce([member.indices(shape, parameters) for member in self.members])

    def encode(self, product: Product, parameters: tuple[int, ...]) -> Encoded:
        """Encode in each format and take the best."""
        ranks = self._ranks(product, parameters[0])
        # Ranks are nested: the factors of a smaller one are leading parts of a larger one's.
        left, right = product.factors(max(ranks.values()))
        tail = product.projector.tail()
        best, least = None, math.inf
        for member, rank in ranks.items():
            loss = float(tail[rank])
            if best is not None and loss >= least:
                continue
            pair = left[:, :rank], right[:rank]
            part = member.store(*pair).cast(product.dtype, product.name)
            if len(ranks) > 1:
                loss += product.rounding_loss(member.rebuild(part, product.precise) - pair[0] @ pair[1])
            if best is None or loss < least:
                best, least = part, loss
        assert best is not None
        return best

    def _ranks(self, product: Product, rank: int) -> dict[Ranked, int]:
        """The largest rank of each format at the cost of the cheapest one at `rank`; those that have none are out."""
        shape = product.shape
        count = int(self.elements(shape, np.array([rank], dtype=np.int64))[0])
        multiple = product.multiple if rank % product.multiple == 0 else 1  # 1: edited by hand
        ranks = np.arange(multiple, min(min(shape) - 1, product.kept) + 1, multiple, dtype=np.int64)
        found = {member: ranks[member.elements(shape, ranks) <= count] for member in self.members}
        return {member: int(fitting[-1]) for member, fitting in found.items() if len(fitting)}

    def store(self, left: Tensor, right: Tensor) -> Encoded:
        """Refuse: which format is best is known by its loss only."""
        raise InputError(f"The format {self.name!r} encodes what has a loss; store factors in a single format.")

    def rebuild(self, part: Encoded, dtype: torch.dtype) -> Tensor:
        """As the format does that was taken."""
        return next(member for member in self.members if member.name == part.format).rebuild(part, dtype)
