"""Leading eigenpairs of a symmetric positive semi-definite matrix."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lowrank_compress.errors import InputError, NumericsError
from lowrank_compress.linalg.lapack import largest_eigenpairs

# From this size on a CPU computes only the eigenvectors that are kept, in less time than torch takes for all.
LAPACK_SIZE = 256


def eigh(matrix: Tensor, keep: int | None = None) -> tuple[Tensor, Tensor]:
    """Decompose M = U diag(λ) Uᵀ, the largest eigenvalues first.

    Deterministic: exact LAPACK or cuSOLVER routines only, and of every eigenvector u and −u the one whose entry of
    largest magnitude is positive.

    Parameters
    ----------
    matrix
        M, (k, k), symmetric; one triangle is read. Positive semi-definite up to rounding.
    keep
        How many eigenpairs to return; None, or k and more, means all k.

    Returns
    -------
    values
        (r,) float64, descending; negative ones, which are rounding, are set to 0.
    vectors
        (k, r) float64 with orthonormal columns, on the device of M.

    Raises
    ------
    InputError
        If M is not square or keep is not positive.
    NumericsError
        If M is not finite or the decomposition fails.
    """
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise InputError(f"An eigendecomposition needs a matrix of shape (k, k), got {tuple(matrix.shape)}.")
    size = len(matrix)
    keep = size if keep is None else min(keep, size)
    if keep < 1:
        raise InputError(f"The number of eigenpairs to keep must be at least 1, got {keep}.")
    # A sum is finite only if all terms are, and needs no second matrix.
    if not bool(torch.isfinite(matrix.sum())):
        raise NumericsError(
            f"Expected a finite {size}x{size} matrix to decompose, got entries that are infinite or not a number. "
            "Check the weights and the statistics: calibrate in float32 or bfloat16."
        )
    try:
        if matrix.is_cpu and size >= LAPACK_SIZE:
            # The transpose of a C-ordered symmetric matrix is the same matrix in Fortran's order.
            copy = matrix.to(torch.float64, copy=True, memory_format=torch.contiguous_format)
            pairs = largest_eigenpairs(copy.numpy().T, keep)
            values, vectors = torch.from_numpy(pairs[0]), torch.from_numpy(pairs[1])
        else:
            values, vectors = torch.linalg.eigh(matrix.double(), UPLO="U")
    except (torch.linalg.LinAlgError, np.linalg.LinAlgError) as error:
        raise NumericsError(
            f"The eigendecomposition of a {size}x{size} matrix failed ({error}). Use a larger shrinkage or more "
            "calibration tokens."
        ) from error
    values, vectors = values[-keep:].flip(0).clamp_(min=0), vectors[:, -keep:].flip(1)
    least, most = vectors.aminmax(dim=0)
    vectors *= torch.where(least + most < 0, -1.0, 1.0).to(vectors)
    return values, vectors
