"""What LAPACK does with a symmetric matrix and SciPy does not offer, or only under Python's lock.

SciPy's own wrappers hold the lock, so that threads could not decompose several matrices at a time, and its ``eigh``
computes a part of the eigenvectors by bisection and inverse iteration. Here the matrix is reduced to tridiagonal form
(dsytrd); relatively robust representations (dstemr: Dhillon and Parlett, Linear Algebra Appl. 387, 2004) give its
eigenvectors; and only those that are asked for are turned back, by larger blocks of reflections than LAPACK's own
routine for it takes (Schreiber and Van Loan, SIAM J. Sci. Stat. Comput. 10, 1989). A congruence with a triangle is the
step that reduces a generalized eigenproblem to a common one (dsygst), at half the operations of two products. The
routines are those that SciPy carries and offers to compiled code.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import numpy as np
from scipy.linalg import (
    LinAlgError,
    cython_lapack,  # pyright: ignore[reportAttributeAccessIssue]
)

# Reflections that are applied at once.
BLOCK = 128


def largest_eigenpairs(matrix: np.ndarray, keep: int) -> tuple[np.ndarray, np.ndarray]:
    """Find the `keep` largest eigenpairs.

    Parameters
    ----------
    matrix
        (k, k) float64, symmetric and finite, in Fortran's order; its lower triangle is read, all of it is overwritten.
    keep
        From 1 to k.

    Returns
    -------
    tuple of ndarray
        Eigenvalues, (keep,), ascending; eigenvectors, (k, keep), orthonormal, in Fortran's order.

    Raises
    ------
    LinAlgError
        A routine reports that it failed.
    """
    size = len(matrix)
    diagonal, beside, scales = np.empty(size), np.empty(size), np.empty(size)
    _run(_DSYTRD, b"L", size, matrix, size, diagonal, beside, scales, workspaces=1)
    # Asked for all, it has a faster way to the eigenvalues, which pays from about a quarter of the vectors on.
    count, interval = (size, b"A") if 4 * keep > size else (keep, b"I")
    values, vectors = np.empty(size), np.empty((size, count), order="F")
    found, support, accurate = ctypes.c_int(), np.empty(2 * count, dtype=np.intc), ctypes.c_int(1)
    wanted = (b"V", interval, size, diagonal, beside, 0.0, 0.0, size - keep + 1, size)
    _run(_DSTEMR, *wanted, found, values, vectors, size, count, support, accurate, workspaces=2)
    if found.value != count:
        raise LinAlgError(f"dstemr found {found.value} eigenpairs of {count}")
    values, vectors = values[count - keep : count], vectors[:, count - keep :]
    _turn_back(matrix, scales, vectors)
    return values, vectors


def congruence(form: np.ndarray, lower: np.ndarray) -> None:
    """Replace the lower triangle of P by that of Lᵀ P L.

    Parameters
    ----------
    form
        P, (k, k) float64, symmetric, in Fortran's order; of P and of the result the lower triangle alone counts.
    lower
        L, (k, k) float64, lower triangular with no zero on its diagonal, in Fortran's order.
    """
    size = len(form)
    _run(_DSYGST, 2, b"L", size, form, size, lower, size)


def _turn_back(reflected: np.ndarray, scales: np.ndarray, vectors: np.ndarray) -> None:
    """Multiply vectors, (k, r), in place by the orthogonal matrix whose reflections dsytrd left below the diagonal."""
    size, count = vectors.shape
    triangle, space = np.empty((BLOCK, BLOCK), order="F"), np.empty((count, BLOCK), order="F")
    for start in reversed(range(0, size - 1, BLOCK)):
        width, height = min(BLOCK, size - 1 - start), size - 1 - start
        block, part = reflected[start + 1 :, start:], vectors[start + 1 :]
        _call(_DLARFT, b"F", b"C", height, width, block, size, scales[start:], triangle, BLOCK)
        shapes = (height, count, width, block, size, triangle, BLOCK, part, size, space, count)
        _call(_DLARFB, b"L", b"N", b"F", b"C", *shapes)


def _routine(name: str) -> Callable[..., None]:
    """Make one of SciPy's LAPACK routines callable; ctypes lets go of Python's lock while it runs."""
    capsule = cython_lapack.__pyx_capi__[name]
    signature = ctypes.PYFUNCTYPE(ctypes.c_char_p, ctypes.py_object)(("PyCapsule_GetName", ctypes.pythonapi))
    address = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
        ("PyCapsule_GetPointer", ctypes.pythonapi)
    )
    return ctypes.CFUNCTYPE(None)(address(capsule, signature(capsule)))


_DSYTRD, _DSTEMR, _DSYGST, _DLARFT, _DLARFB = map(_routine, ("dsytrd", "dstemr", "dsygst", "dlarft", "dlarfb"))


def _run(routine: Callable[..., None], *arguments: object, workspaces: int = 0) -> None:
    """Call a routine whose last arguments are up to two workspaces (float64, int) with their lengths, and a code.

    Raises
    ------
    LinAlgError
        The code tells of a failure.
    """
    code = ctypes.c_int()
    asked: list[np.ndarray] = [np.empty(1), np.empty(1, dtype=np.intc)][:workspaces]
    if asked:  # how long should they be?
        _call(routine, *arguments, *(word for space in asked for word in (space, -1)), code)
    spaces = [np.empty(max(1, int(space[0])), dtype=space.dtype) for space in asked]
    _call(routine, *arguments, *(word for space in spaces for word in (space, len(space))), code)
    if code.value:
        raise LinAlgError(f"a LAPACK routine returned the code {code.value}")


def _call(routine: Callable[..., None], *arguments: object) -> None:
    routine(*(_passed(argument) for argument in arguments))


def _passed(argument: object) -> object:
    """Return an argument as Fortran takes it: by its address."""
    if isinstance(argument, bytes):
        return argument
    if isinstance(argument, np.ndarray):
        return ctypes.c_void_p(argument.ctypes.data)
    if isinstance(argument, int):
        argument = ctypes.c_int(argument)
    elif isinstance(argument, float):
        argument = ctypes.c_double(argument)
    assert isinstance(argument, ctypes.c_int | ctypes.c_double)
    return ctypes.byref(argument)
