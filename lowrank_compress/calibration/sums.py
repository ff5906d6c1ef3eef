"""What is summed for each statistic: rows whose second moments are taken, sums of other kinds, and largest values.

The notation is that of `statistics`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from lowrank_compress.arch.targets import Heads
from lowrank_compress.calibration.experts import Routed
from lowrank_compress.calibration.statistics import ROUTED


@dataclass(frozen=True)
class Seen:
    """What one target sees of one batch.

    Attributes
    ----------
    x
        (sequences, length, in); padded positions are zero.
    y
        (sequences, length, out) without bias; padded positions are zero.
    z
        (sequences, length, out) with the bias; padded positions are zero.
    g
        (sequences, length, out), or None where no gradient is taken; padded positions are zero.
    delta
        g W, (sequences, length, in), where ``in_fisher`` is wanted of the target and g is there; or None.
    heads
        How an attention projection divides; None in the MLP.
    first
        Number of the first sequence in the calibration set.
    routed
        Which tokens these are, for a routed expert, whose rows are sorted by sequence; None for what sees all.
    """

    x: Tensor
    y: Tensor
    z: Tensor
    g: Tensor | None
    delta: Tensor | None
    heads: Heads | None
    first: int = 0
    routed: Routed | None = None


def _rows(values: Tensor) -> Tensor:
    return values.flatten(0, -2)


def _gradient(seen: Seen) -> Tensor:
    assert seen.g is not None
    return seen.g


def _delta(seen: Seen) -> Tensor:
    assert seen.delta is not None
    return seen.delta


def _heads(seen: Seen) -> Heads:
    assert seen.heads is not None
    return seen.heads


def _routed(seen: Seen) -> Routed:
    assert seen.routed is not None
    return seen.routed


def _norms(seen: Seen) -> Tensor:
    return seen.z.norm(dim=-1, keepdim=True)


def _second_by_head(values: Tensor, heads: Heads) -> Tensor:
    """Σ over tokens of v vᵀ of each head, (heads, size, size); values are (…, heads · size)."""
    parts = _rows(values).unflatten(1, (-1, heads.size)).movedim(1, 0)
    return parts.mT @ parts


def _score_gradient(z: Tensor, g: Tensor, heads: Heads) -> Tensor:
    """Return t, (…, key · size): the sum of g ⊙ z over the query heads of each key-value head."""
    return (g * z).unflatten(-1, (heads.key, -1, heads.size)).sum(-2).flatten(-2)


def row_sums_of_squared_gradients(x: Tensor, g: Tensor) -> Tensor:
    """Sum over sequences of the row sums of (∂ℒ/∂W)², ∂ℒ/∂W = gᵀx of a sequence; (out,).

    Takes the cheaper of two equal ways: form ∂ℒ/∂W, or use Σ_j (gᵀx)²_ij = g_iᵀ (x xᵀ) g_i without forming it.

    Parameters
    ----------
    x
        (sequences, length, in).
    g
        (sequences, length, out).
    """
    length, width, out = x.shape[1], x.shape[2], g.shape[2]
    if length * (width + out) < width * out:
        return (g * ((x @ x.transpose(1, 2)) @ g)).sum((0, 1))
    return (g.transpose(1, 2) @ x).square().sum((0, 2))


# Statistics that are second moments of whole rows, by those rows; other sums; and what is the largest of all tokens'.
ROWS: Mapping[str, Callable[[Seen], Tensor]] = {
    "in_gram": lambda seen: seen.x,
    "out_gram": lambda seen: seen.y,
    "out_fisher": _gradient,
    "in_fisher": _delta,
}
SUMS: Mapping[str, Callable[[Seen], Tensor]] = {
    "in_mean": lambda seen: _rows(seen.x).sum(0),
    "in_abs": lambda seen: _rows(seen.x).abs().sum(0),
    "in_square": lambda seen: _rows(seen.x).square().sum(0),
    "out_square": lambda seen: _rows(_gradient(seen)).square().sum(0),
    "row_fisher": lambda seen: row_sums_of_squared_gradients(seen.x, _gradient(seen)),
    "head_gram": lambda seen: _second_by_head(seen.z, _heads(seen)),
    "head_fisher": lambda seen: _second_by_head(_gradient(seen), _heads(seen)),
    "score_fisher": lambda seen: _second_by_head(_score_gradient(seen.z, _gradient(seen), _heads(seen)), _heads(seen)),
    ROUTED: lambda seen: _routed(seen).counts.sum()[None],
    "router_weight": lambda seen: _routed(seen).weights.sum()[None],
    "output_norm": lambda seen: _norms(seen).sum()[None],
    "routed_norm": lambda seen: (_routed(seen).weights * _norms(seen)).sum()[None],
    "hidden_energy": lambda seen: _rows(_routed(seen).weights * seen.x).square().sum(0),
}
PEAKS: Mapping[str, Callable[[Seen], Tensor]] = {
    # A row of zeros, as there may be no token.
    "hidden_peak": lambda seen: nn.functional.pad(_rows(_routed(seen).weights * seen.x).square(), (0, 0, 0, 1)).amax(0),
}
