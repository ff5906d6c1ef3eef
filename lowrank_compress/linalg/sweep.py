"""Quantization column by column, later ones making up for the errors of earlier ones (GPTQ, ICLR 2023).

Minimised is ‖(W − Q) R‖_F with R Rᵀ = G, the Gram matrix of the inputs. Once column j is rounded with the error e,
those behind it move by what makes up best for it, −e U_j,j+1: / U_jj, with UᵀU = G⁻¹ and U upper triangular: this is
Babai's nearest-plane rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank_compress.errors import NumericsError
from lowrank_compress.linalg.quantize import Quantized, Scales, nearest

BLOCK = 128


def damped(gram: Tensor, damping: float) -> Tensor:
    """Add `damping` times its mean diagonal to a Gram matrix's diagonal; 1 to one of zeros."""
    made = gram.clone()
    mean = float(gram.diagonal().mean())
    made.diagonal().add_(damping * mean if mean > 0 else 1.0)
    return made


def swept(weight: Tensor, scales: Scales, gram: Tensor, *, ordered: bool = True) -> Quantized:
    """Quantize a matrix with given scales.

    Parameters
    ----------
    weight
        W, (m, n) float64.
    scales
        Those of its groups.
    gram
        G, (n, n) float64, positive definite: see `damped`.
    ordered
        Round the columns with the largest inputs first, while there are many left to make up for their errors.

    Raises
    ------
    NumericsError
        G is not positive definite.
    """
    n = weight.shape[1]
    order = torch.argsort(gram.diagonal(), descending=True, stable=True) if ordered else torch.arange(n)
    order = order.to(weight.device)
    upper = _inverse_root(gram[order][:, order])
    scale, zero = (part[:, order] for part in scales.columns())
    left, codes = weight[:, order].clone(), torch.empty_like(weight)
    for start in range(0, n, BLOCK):
        stop = min(start + BLOCK, n)
        errors = weight.new_empty(len(weight), stop - start)
        for j in range(start, stop):
            codes[:, j] = nearest(left[:, j], scale[:, j], zero[:, j], scales.grid)
            error = (left[:, j] - (codes[:, j] - zero[:, j]) * scale[:, j]) / upper[j, j]
            left[:, j + 1 : stop].addr_(error, upper[j, j + 1 : stop], alpha=-1)
            errors[:, j - start] = error
        left[:, stop:].addmm_(errors, upper[start:stop, stop:], alpha=-1)
    restored = torch.empty_like(codes)
    restored[:, order] = codes
    return Quantized(scales, restored)


def _inverse_root(gram: Tensor) -> Tensor:
    """Return the upper triangular U with UᵀU = G⁻¹."""
    root, problem = torch.linalg.cholesky_ex(gram)
    if int(problem):
        raise NumericsError(
            "The Gram matrix of a quantized matrix's inputs is not positive definite. Raise --damping, or use more "
            "calibration text."
        )
    return torch.linalg.cholesky(torch.cholesky_inverse(root), upper=True)
