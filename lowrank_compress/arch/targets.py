"""What may be compressed of a model: matrices as views of its parameters."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lowrank_compress.arch.spec import Architecture, Reads, Role

if TYPE_CHECKING:
    pass


@dataclass(frozen=True, slots=True)
class Rows:
    """The output rows of a module that belong to one part of its weight.

    Row ``g * length + j`` of the part is row ``g * stride + offset + j`` of the module, for g < `groups` and
    j < `length`. A module has ``groups * stride`` output rows in all; blocked parts have one group.
    """

    groups: int
    stride: int
    offset: int
    length: int

    @property
    def size(self) -> int:
        """Number of rows of the part."""
        return self.groups * self.length

    @property
    def total(self) -> int:
        """Number of output rows of the whole module."""
        return self.groups * self.stride

    def index(self) -> torch.Tensor:
        """Return the module's row for each row of the part, (size,) int64, increasing."""
        starts = torch.arange(self.groups, device="cpu") * self.stride + self.offset
        return (starts[:, None] + torch.arange(self.length, device="cpu")).flatten()


@dataclass(frozen=True, slots=True)
class Heads:
    """How an attention module divides queries, keys and values; in grouped-query attention (GQA) several queries share.

    Parameters
    ----------
    query
        Number of query heads.
    key
        Number of key-value heads; each serves ``query // key`` query heads that follow one another.
    size
        Dimensions of one head.
    rotary
        Leading dimensions of a head that are rotated, dimension i together with i + rotary / 2; 0 where a model has no
        rotary embeddings.
    """

    query: int
    key: int
    size: int
    rotary: int


@dataclass(frozen=True, slots=True)
class View:
    """Which part of a parameter a matrix is, and how it lies there.

    Parameters
    ----------
    rows
        Which of the parameter's rows, counted by what they compute, it has.
    transposed
        Whether the parameter is stored as (in, out).
    expert
        Index into the leading dimension of a parameter that holds several experts; None for a plain matrix.
    """

    rows: Rows
    transposed: bool = False
    expert: int | None = None


@dataclass(frozen=True, slots=True)
class Target:
    """One matrix that may be compressed: a parameter, or a part of one.

    Parameters
    ----------
    name
        Path of the module, followed by ``":"`` and the role if the weight is fused.
    block
        Index of the transformer block.
    parameter
        Name of the parameter in the model.
    view
        Which part of it the matrix is.
    bias
        Name of the bias that is added to what the parameter computes; None where there is none.
    role
        What the matrix computes.
    group
        Name of the group that the architecture counts the role to.
    shape
        (out, in) of the matrix, however it is stored.
    reads
        Input tensor, the very same for all targets of a block with this value.
    heads
        The attention heads that the rows (q, k, v) or columns (o) belong to; None in the MLP, and where heads are made
        of a latent vector.
    expert
        Number of the routed expert that it is a matrix of; None for others.
    experts
        How many routed experts its block has beside that one, it included; 0 for others.
    """

    name: str
    block: int
    parameter: str
    view: View
    bias: str | None
    role: Role
    group: str
    shape: tuple[int, int]
    reads: Reads
    heads: Heads | None
    expert: int | None = None
    experts: int = 0

    @property
    def module(self) -> str:
        """Path of the module that the parameter belongs to."""
        return self.parameter.rpartition(".")[0]

    @property
    def elements(self) -> int:
        """Number of elements of the dense matrix."""
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True, slots=True)
class Router:
    """What chooses among the routed experts of a block; it is alike in all blocks that have experts.

    Parameters
    ----------
    path
        Of the module, below a block.
    chosen
        Experts that a token goes to.
    fixed
        Why it cannot do with fewer experts, "" where it can.
    """

    path: str
    chosen: int
    fixed: str = ""


@dataclass(frozen=True, slots=True)
class Resolved:
    """The compressible matrices of a model, block by block in the order of computation.

    Parameters
    ----------
    architecture
        The table entry.
    blocks
        Paths of the transformer blocks in the model.
    targets
        All claimed matrices of the blocks.
    heads
        What all attention modules have in common.
    outside
        Matrices outside the blocks that may be compressed where that is asked for; as their block they have the number
        behind the last one's. A head that shares its weight with the embedding is none.
    router
        What chooses among experts; None where there are none.
    """

    architecture: Architecture
    blocks: tuple[str, ...]
    targets: tuple[Target, ...]
    heads: Heads
    outside: tuple[Target, ...] = ()
    router: Router | None = None

    def of_block(self, block: int) -> tuple[Target, ...]:
        """Return the targets of one block, or those outside of all of them."""
        return tuple(target for target in (*self.targets, *self.outside) if target.block == block)

    def modules(self) -> dict[str, tuple[Target, ...]]:
        """Return, for the path of each claimed module of the blocks, its targets in the order of the fused parts."""
        return _by_module(self.targets)

    def modules_of(self, block: int) -> dict[str, tuple[Target, ...]]:
        """Return the same for one block, or for what may be compressed outside of all of them."""
        return _by_module(self.of_block(block))


def _by_module(targets: Iterable[Target]) -> dict[str, tuple[Target, ...]]:
    found: dict[str, tuple[Target, ...]] = {}
    for target in targets:
        found[target.module] = (*found.get(target.module, ()), target)
    return found
