"""What an encoded target group changes in a model, whatever the method."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lowrank_compress.allocation.choice import Choice
from lowrank_compress.arch.targets import Target
from lowrank_compress.formats.spec import Encoded


@dataclass(frozen=True)
class Source:
    """Where a group finds what it encodes, and how results are rounded.

    Attributes
    ----------
    weight, bias
        Read the matrix (out, in), and the part of the bias (out,), of a target, as stored.
    device
        Where to compute.
    dtype
        In which results will be stored.
    multiple
        What parameters that a format chooses by itself are multiples of.
    """

    weight: Callable[[Target], Tensor]
    bias: Callable[[Target], Tensor]
    device: torch.device
    dtype: torch.dtype
    multiple: int = 1

    @property
    def precise(self) -> torch.dtype:
        """In which products are computed: what is rounded to 16 bits loses nothing in single precision."""
        return torch.float32 if self.dtype.itemsize == 2 else torch.float64


@dataclass(frozen=True)
class Narrower:
    """Attention heads that keep fewer dimensions.

    Attributes
    ----------
    group
        Which of their matrices: "qk" or "vo".
    width
        Dimensions that a head keeps.
    index
        (key-value heads, width) int64: which dimensions of rotated heads these are; None where nobody has to know.
    """

    group: str
    width: int
    index: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Remembered:
    """What an attention's cache keeps of a token in the place of keys and values, and how these are rebuilt.

    Attributes
    ----------
    window
        Last tokens whose keys and values are kept exactly besides.
    inner
        B (r, hidden), as it will be stored.
    outer
        A (2 · kv, r), keys before values, as it will be stored.
    """

    window: int
    inner: Tensor
    outer: Tensor

    @property
    def rank(self) -> int:
        """Numbers that are kept of a token."""
        return len(self.inner)


@dataclass(frozen=True)
class Rerouted:
    """A router that chooses among some of a block's experts only.

    Attributes
    ----------
    path
        Of the router.
    kept
        (n,) int64: which experts, ascending.
    """

    path: str
    kept: Tensor


@dataclass(frozen=True)
class Merged:
    """Experts of a block of which some stand for the others.

    Attributes
    ----------
    path
        Of the experts.
    leads
        (experts,) int64: which expert stands for each, itself or another.
    """

    path: str
    leads: Tensor


class Later(Mapping[str, Encoded]):
    """Matrices in a format, each made when it is asked for, and every time anew.

    Parameters
    ----------
    makers
        Target name -> makes its matrix.
    """

    def __init__(self, makers: Mapping[str, Callable[[], Encoded]]) -> None:
        self._makers = makers

    def __getitem__(self, name: str) -> Encoded:
        return self._makers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)


@dataclass(frozen=True)
class Edit:
    """What encoding a group changes.

    Attributes
    ----------
    choice
        What it is stored as; where a choice leaves the format open, the one that was taken.
    parts
        Target name -> its matrix in a format.
    biases
        Target name -> its bias (out,), float64, where that changes.
    heads
        How attention heads become narrower, if they do.
    router
        Which experts a router still knows, if not all.
    merged
        Which experts stand for others, if any do.
    remembered
        What the cache keeps, if that is not keys and values.
    """

    choice: Choice
    parts: Mapping[str, Encoded] = field(default_factory=dict)
    biases: Mapping[str, Tensor] = field(default_factory=dict)
    heads: Narrower | None = None
    router: Rerouted | None = None
    merged: Merged | None = None
    remembered: Remembered | None = None


@dataclass(frozen=True)
class Replacement:
    """What a choice makes of a target, in the dense model's own shapes.

    Attributes
    ----------
    target
        Which.
    weight, bias
        (out, in); (out,), or None where it stays as it is.
    """

    target: Target
    weight: Tensor
    bias: Tensor | None = None
