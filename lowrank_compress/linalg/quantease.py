"""Coordinate descent over the codes of a quantized matrix (QuantEase, arXiv 2309.01885).

Minimised is ‖(W − Q) R‖²_F = tr (W − Q) G (W − Q)ᵀ, one column after another, all rows at once: with the others as they
are, the best of column j is the point nearest to w_j + Σ_{k≠j} (w_k − q_k) G_kj / G_jj. No step makes the loss larger,
and G need not be inverted. With an allowance of outliers, the few weights that lose most are kept as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank_compress.linalg.quantize import Quantized, nearest, rounded, searched

BLOCK = 128


def loss(error: Tensor, gram: Tensor, fisher: Tensor | None = None) -> float:
    """Return tr F E G Eᵀ of an error E (m, n) with G (n, n), and F (m, m) or the identity."""
    images = error @ gram
    return float((images * (error if fisher is None else fisher @ error)).sum())


def descended(found: Quantized, weight: Tensor, gram: Tensor, passes: int = 1) -> Quantized:
    """Go over all columns, as often as `passes` says; the scales stay.

    Parameters
    ----------
    found
        Where to start: codes and scales of the matrix.
    weight, gram
        W, (m, n), and G, (n, n), float64.
    """
    grid, n = found.scales.grid, weight.shape[1]
    scale, zero = found.scales.columns()
    codes = found.codes.clone()
    curvature = gram.diagonal().clamp_min(torch.finfo(gram.dtype).tiny)
    error = weight - (codes - zero) * scale
    pull = error @ gram
    for _ in range(passes):
        for start in range(0, n, BLOCK):
            stop = min(start + BLOCK, n)
            moved = weight.new_empty(len(weight), stop - start)
            local = pull[:, start:stop].clone()
            for j in range(start, stop):
                # What the column's own error adds to its pull is taken off by adding the column itself.
                target = weight[:, j] + local[:, j - start] / curvature[j] - error[:, j]
                codes[:, j] = nearest(target, scale[:, j], zero[:, j], grid)
                now = weight[:, j] - (codes[:, j] - zero[:, j]) * scale[:, j]
                moved[:, j - start] = now - error[:, j]
                local.addr_(moved[:, j - start], gram[j, start:stop])
                error[:, j] = now
            pull.addmm_(moved, gram[start:stop])
    return Quantized(found.scales, codes)


def with_outliers(
    found: Quantized, weight: Tensor, gram: Tensor, count: int, rounds: int = 3, dtype: torch.dtype | None = None
) -> tuple[Quantized, Tensor]:
    """Keep a few weights apart, in full precision: W ≈ Q + H, H with `count` non-zeros at most.

    Kept are those with the largest w²_ij G_jj; scales are searched without them, as they need not reach so far. In turn
    Q is fitted to W − H, and H takes a step down the loss's gradient on its own places, of the length that is the
    reciprocal of G's largest eigenvalue. The best of the rounds is returned, `found` alone among them.

    Returns
    -------
    tuple
        Q, and H, (m, n).
    """
    sparse = torch.zeros_like(weight)
    best = (found, sparse, loss(weight - found.matrix(), gram))
    kept = (weight.square() * gram.diagonal()).flatten().topk(count).indices
    place = sparse.flatten().index_fill(0, kept, 1).view_as(weight)
    sparse = weight * place
    scales = searched(weight - sparse, found.scales.grid, gram.diagonal(), dtype)
    found, step = rounded(weight - sparse, scales), 1 / float(torch.linalg.eigvalsh(gram)[-1])
    for _ in range(rounds):
        found = descended(found, weight - sparse, gram, 2)
        sparse = sparse + step * ((weight - found.matrix() - sparse) @ gram) * place
        reached = loss(weight - found.matrix() - sparse, gram)
        if reached < best[2]:
            best = (found, sparse, reached)
    return best[:2]
