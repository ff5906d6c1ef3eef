"""What a storage format is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from lowrank_compress.linalg.pivot import pivot
from lowrank_compress.linalg.weighted import Projector, factors
from lowrank_compress.model.casting import cast

Shape = tuple[int, int]


@dataclass(frozen=True)
class Encoded:
    """One matrix in a storage format.

    Attributes
    ----------
    format, parameters
        As in a choice.
    shape
        (out, in) of the matrix.
    inner
        What goes into the first product, which is one for all parts of a fused weight: (rows, in).
    others
        Further tensors by their leaf names in the compressed module (see `CompressedLinear`); where a module has
        several parts, the part's number is put behind the first word: ``lr_out.weight`` becomes ``lr_out_0.weight``.
    """

    format: str
    parameters: tuple[int, ...]
    shape: Shape
    inner: Tensor
    others: Mapping[str, Tensor] = field(default_factory=dict)

    def cast(self, dtype: torch.dtype, name: str) -> Encoded:
        """Round to the dtype in which it will be stored; `name` is the matrix's, for the error where that overflows."""
        alone = not any(tensor.is_floating_point() for tensor in self.others.values())
        what = name if alone else f"A factor of {name}"
        inner = cast(self.inner, dtype, what)
        return replace(
            self, inner=inner, others={leaf: cast(tensor, dtype, what) for leaf, tensor in self.others.items()}
        )


@dataclass(frozen=True, eq=False)
class Product:
    """What is to be encoded: the best approximations Ŵ_r = A_r B_r of a matrix for all ranks up to that of a basis.

    Attributes
    ----------
    name
        Of the matrix, for messages.
    weight
        W, (out, in).
    projector
        Its basis, with matrices in the dtype to multiply in.
    sensitivities
        Diagonals of LᵀL, (out,), and R Rᵀ, (in,), float64: what an error of single elements costs.
    dtype
        In which tensors will be stored.
    multiple
        What parameters that a format chooses by itself are multiples of.
    found
        Factors of a rank that is not exceeded, on the CPU, if they were computed already.
    """

    name: str
    weight: Tensor
    projector: Projector
    sensitivities: tuple[Tensor, Tensor]
    dtype: torch.dtype
    multiple: int = 1
    found: tuple[Tensor, Tensor] | None = None

    @property
    def shape(self) -> Shape:
        """(out, in)."""
        return (self.weight.shape[0], self.weight.shape[1])

    @property
    def kept(self) -> int:
        """The largest rank there is."""
        return self.projector.expand.shape[1]

    @property
    def precise(self) -> torch.dtype:
        """In which products are computed."""
        return self.projector.expand.dtype

    def exact(self, rank: int) -> tuple[Tensor, Tensor]:
        """Return A_r, (out, r), and B_r, (r, in), where they are computed."""
        return factors(self.weight, self.projector, rank)

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """Return A_r, (out, r), and B_r, (r, in), on the CPU."""
        if self.found is not None:
            return self.found[0][:, :rank], self.found[1][:rank]
        left, right = self.exact(rank)
        return left.cpu(), right.cpu()

    def interpolated(self, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return indices, ascending, of r rows of Ŵ_r, these rows, and the coefficients of the others in them."""
        found = pivot(*self.factors(rank))
        return found.index, found.pivots, found.coefficients

    def up_to(self, rank: int) -> Product:
        """Compute factors once, for ranks up to this one."""
        return replace(self, found=self.factors(rank))

    def rounding_loss(self, error: Tensor) -> float:
        """Squared metric loss of an error (out, in) with independent elements, as rounding makes it."""
        rows, columns = self.sensitivities
        return float(rows @ (error.square_() @ columns.to(error.dtype)).double())


class Format(ABC):
    """A way to store a matrix of shape (m, n): a table entry.

    Attributes
    ----------
    name
        What users call it, in ranks.json and config.json too.
    help
        One line for `lrc list storages`.
    parameters
        Names of what it leaves open, as ranks.json spells them.
    """

    name: str
    help: str
    parameters: tuple[str, ...]

    @abstractmethod
    def grid(self, shape: Shape, multiple: int) -> np.ndarray:
        """Return what its parameters may be, (choices, parameters) int64, by rising cost.

        Parameters
        ----------
        multiple
            Ranks are multiples of it: the kernels of GPUs are fast at multiples of 8.
        """

    @abstractmethod
    def cost(self, shape: Shape, parameters: np.ndarray) -> np.ndarray:
        """Return the stored elements, indices included: (choices,) int64."""

    def indices(self, shape: Shape, parameters: np.ndarray) -> np.ndarray:
        """Return how many of the stored elements are indices, (choices,) int64; where it may vary, the most."""
        return np.zeros(len(parameters), dtype=np.int64)

    @abstractmethod
    def rank(self, parameters: tuple[int, ...]) -> int:
        """Return the largest rank that a basis must have for it."""

    @abstractmethod
    def losses(self, tail: np.ndarray, parameters: np.ndarray) -> np.ndarray:
        """Return the squared losses, (choices,), from those of the best approximations of rank 0, 1 and so on."""

    @abstractmethod
    def encode(self, product: Product, parameters: tuple[int, ...]) -> Encoded:
        """Put a matrix into the format, rounded to the dtype in which it will be stored."""

    @abstractmethod
    def rebuild(self, part: Encoded, dtype: torch.dtype) -> Tensor:
        """Return the matrix (out, in) that an encoded one stands for, computed in a dtype."""

    def approximate(self, product: Product, parameters: tuple[int, ...]) -> Tensor:
        """Return what a matrix becomes (out, in), before it is rounded where that can be told; on its device."""
        return self.rebuild(self.encode(product, parameters), product.precise).to(product.weight.device)
