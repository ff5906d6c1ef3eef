"""Leading eigenpairs of a symmetric positive semi-definite matrix."""

from __future__ import annotations

import scipy.linalg
import torch
from torch import Tensor

from lowrank_compress.errors import InputError, NumericsError

# LAPACK's dsyevr with an index range (bisection and inverse iteration) beats a full divide and conquer up to about this
# share of the vectors: measured on one core, k = 256 to 2048, spectra flat, decaying and rank-deficient.
PARTIAL_SHARE = 0.4
PARTIAL_SIZE = 256


def eigh(matrix: Tensor, keep: int | None = None) -> tuple[Tensor, Tensor]:
    """Decompose M = U diag(λ) Uᵀ, the largest eigenvalues first.

    Deterministic: exact LAPACK or cuSOLVER routines only, and of every eigenvector u and −u the one whose entry of
    largest magnitude is positive. Where only a small part is kept on a CPU, only that part is computed.

    Parameters
    ----------
    matrix
        M, (k, k); only its symmetric part counts. Positive semi-definite up to rounding.
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
    matrix = matrix.double()
    matrix = (matrix + matrix.mT).mul_(0.5)
    if not bool(torch.isfinite(matrix).all()):
        raise NumericsError(
            f"Expected a finite {size}x{size} matrix to decompose, got entries that are infinite or not a number. "
            "Check the weights and the statistics: calibrate in float32 or bfloat16."
        )
    try:
        if matrix.is_cpu and size >= PARTIAL_SIZE and keep <= PARTIAL_SHARE * size:
            # The transpose of a C-ordered symmetric matrix is the same matrix in LAPACK's order: no copy is made.
            pairs = scipy.linalg.eigh(
                matrix.numpy().T,
                subset_by_index=(size - keep, size - 1),
                driver="evr",
                overwrite_a=True,
                check_finite=False,
            )
            values, vectors = torch.from_numpy(pairs[0]), torch.from_numpy(pairs[1])
        else:
            values, vectors = torch.linalg.eigh(matrix)
            values, vectors = values[-keep:], vectors[:, -keep:]
    except (torch.linalg.LinAlgError, scipy.linalg.LinAlgError) as error:
        raise NumericsError(
            f"The eigendecomposition of a {size}x{size} matrix failed ({error}). Use a larger shrinkage or more "
            "calibration tokens."
        ) from error
    values, vectors = values.flip(0).clamp_(min=0), vectors.flip(1)
    least, most = vectors.aminmax(dim=0)
    vectors *= torch.where(least + most < 0, -1.0, 1.0).to(vectors)
    return values, vectors
