"""What a storage format is: what it costs, how a matrix is put into it, and how a layer computes with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

INDEX_DTYPE = torch.int32


class Part:
    """One part of a compressed linear layer; a subclass is a storage format.

    The layer multiplies its input x once with ``lr_in``, whose rows are those of all its parts. A part takes its own
    `width` of the product, h, and emits columns of the output. Other tensors that it needs are the layer's children and
    buffers under names that end in its suffix.

    Parameters
    ----------
    entry : mapping
        Of the config: ``rows``, ``format`` and the format's own `keys`.
    suffix : str
        Empty in a layer of one part, else ``_0``, ``_1``, ...

    Attributes
    ----------
    format : str
        Its name in the config.
    help : str
        One line for people.
    parameters : tuple of str
        What it leaves open, as ranks.json spells it.
    keys : tuple of str
        What its entry has beside ``rows`` and ``format``.
    since : int
        The first version of what a checkpoint holds that has this format.
    reorders : bool
        Whether its rows are emitted in another order than their own.
    plain : bool
        Whether what it emits is h and nothing else.
    rows, width : int
        Rows of the weight it stands for, and those that it takes in ``lr_in``.
    outer : str
        The name of the linear layer that is to follow ``lr_in``, if there is one.
    """

    format: ClassVar[str]
    help: ClassVar[str]
    parameters: ClassVar[tuple[str, ...]] = ("rank",)
    keys: ClassVar[tuple[str, ...]] = ("rank",)
    since: ClassVar[int] = 1
    reorders: ClassVar[bool] = False
    plain: ClassVar[bool] = False

    def __init__(self, entry: Mapping[str, Any], suffix: str) -> None:
        self.rows, self.width, self.suffix = int(entry["rows"]), self.inner_rows(entry), suffix
        self.outer = f"lr_out{suffix}"

    @classmethod
    def inner_rows(cls, entry: Mapping[str, Any]) -> int:
        """Count the rows that such a part takes in ``lr_in``; there may be none."""
        return int(entry["rank"])

    @classmethod
    def most(cls, entry: Mapping[str, Any]) -> int:
        """Return the largest rank that such a part may have."""
        return int(entry["rows"])

    @classmethod
    def problem(cls, entry: Mapping[str, Any]) -> str:
        """Say why an entry with the right keys is none of this format, or nothing."""
        rank, most = cls.inner_rows(entry), cls.most(entry)
        if 1 <= rank <= most:
            return ""
        return f"the rank of a {cls.format} part of {entry['rows']} rows is from 1 to {most}, got {dict(entry)}"

    # What follows plans and encodes; a layer has no use for it.

    @classmethod
    def elements(cls, m: int, n: int, *parameters: Any) -> Any:
        """Count what a matrix (m, n) stores, indices included; parameters are integers, or integer arrays."""
        raise NotImplementedError

    @classmethod
    def indices(cls, m: int, n: int, *parameters: Any) -> Any:
        """Count the indices among what it stores."""
        return 0 * parameters[0]

    @classmethod
    def grid(cls, m: int, n: int, multiple: int) -> list[tuple[int, ...]]:
        """List what the parameters may be, by rising cost; ranks are multiples of `multiple`."""
        return [(rank,) for rank in range(multiple, min(m, n), multiple)]

    @classmethod
    def basis_rank(cls, *parameters: int) -> int:
        """Return the largest rank that a basis must have for it."""
        return parameters[0]

    @classmethod
    def losses(cls, tail: Any, *parameters: Any) -> Any:
        """Return squared losses at arrays of parameters; `tail[r]` is that of the best approximation of rank r."""
        return tail[parameters[0]]

    @classmethod
    def encode(cls, product: Any, *parameters: int) -> dict[str, Tensor]:
        """Put a matrix into the format: its rows of ``lr_in.weight`` and its other tensors, as if it were alone.

        `product.factors(r)` are A (m, r) and B (r, n) of the best approximation; `product.interpolated(r)` are indices,
        ascending, of r rows of it that span the others, these rows, and the coefficients of the others in them.
        """
        raise NotImplementedError

    @classmethod
    def describe(cls, m: int, n: int, *parameters: int) -> dict[str, Any]:
        """Make the entry of a matrix (m, n)."""
        return {"rows": m, "format": cls.format, **dict(zip(cls.parameters, parameters, strict=True))}

    def factors(self) -> dict[str, tuple[int, int]]:
        """Name its linear layers beside ``lr_in``, none with a bias, and the shape (out, in) of each."""
        return {}

    def buffers(self, device: torch.device) -> dict[str, Tensor]:
        """Name its buffers, with valid values to start from."""
        return {}

    def emit(self, layer: nn.Module, x: Tensor, h: Tensor) -> tuple[Tensor, ...]:
        """Compute its columns of the output, in pieces, from x (..., in_features) and h (..., width)."""
        raise NotImplementedError

    def emitted_rows(self, layer: nn.Module, inner: Tensor) -> tuple[Tensor, ...]:
        """Multiply out its rows of the weight, in the pieces and the order of `emit`.

        `inner` (width, in_features) are its rows of ``lr_in``, in the dtype to compute in.
        """
        raise NotImplementedError

    def grown(self, layer: nn.Module, inner: Tensor, left: Tensor, right: Tensor) -> dict[str, Tensor] | None:
        """Add a product of rank r to the matrix: return its tensors, as `encode` names them, at a rank r higher.

        None where a format cannot; the matrix is multiplied out then.

        Parameters
        ----------
        inner : Tensor
            (width, in_features), its rows of ``lr_in``, in the dtype to compute in.
        left, right : Tensor
            (rows, r), in the order of its rows, and (r, in_features).
        """
        return None

    def order(self, layer: nn.Module, device: torch.device) -> Tensor:
        """Return which of its rows each emitted one is: int64 (rows,)."""
        return torch.arange(self.rows, device=device)

    def check(self, layer: nn.Module, path: str) -> None:
        """Make sure that its loaded tensors have values that it can compute with; `path` is the layer's.

        Raises
        ------
        ValueError
            They do not.
        """


def require_distinct(name: str, stored: Tensor, count: int, ascending: bool = True) -> None:
    """Make sure that stored indices name rows of `count`, each once: others would compute something else.

    Raises
    ------
    ValueError
        They do not.
    """
    if stored.device.type == "meta" or type(stored) is not Tensor:
        return
    index = stored.long()
    steps = (index if ascending else index.sort(-1).values).diff()
    if int(index.min()) < 0 or int(index.max()) >= count or not bool((steps > 0).all()):
        raise ValueError(f"{name} does not name distinct rows of {count}, in order: it is damaged")
