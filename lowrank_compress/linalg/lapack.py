"""LAPACK's route to the largest eigenpairs of a symmetric matrix, in steps and without Python's lock.

SciPy's own wrappers hold the lock, so that threads could not decompose several matrices at a time, and its ``eigh``
computes a part of the eigenvectors by bisection and inverse iteration. Here the matrix is reduced to tridiagonal form
(dsytrd); relatively robust representations (dstemr: Dhillon and Parlett, Linear Algebra Appl. 387, 2004) give the
eigenvectors that are asked for and no others; and those alone are turned back (dormtr). The routines are those that
SciPy carries and offers to compiled code.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import numpy as np
from scipy.linalg import (
    LinAlgError,
    cython_lapack,  # pyright: ignore[reportAttributeAccessIssue]
)


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
    # Asked for all, it has a faster way to the eigenvalues, which pays from about half of the vectors on.
    count, interval = (size, b"A") if 2 * keep > size else (keep, b"I")
    values, vectors = np.empty(size), np.empty((size, count), order="F")
    found, support, accurate = ctypes.c_int(), np.empty(2 * count, dtype=np.intc), ctypes.c_int(1)
    wanted = (b"V", interval, size, diagonal, beside, 0.0, 0.0, size - keep + 1, size)
    _run(_DSTEMR, *wanted, found, values, vectors, size, count, support, accurate, workspaces=2)
    if found.value != count:
        raise LinAlgError(f"dstemr found {found.value} eigenpairs of {count}")
    values, vectors = values[count - keep : count], vectors[:, count - keep :]
    _run(_DORMTR, b"L", b"L", b"N", size, keep, matrix, size, scales, vectors, size, workspaces=1)
    return values, vectors


def _routine(name: str) -> Callable[..., None]:
    """Make one of SciPy's LAPACK routines callable; ctypes lets go of Python's lock while it runs."""
    capsule = cython_lapack.__pyx_capi__[name]
    signature = ctypes.PYFUNCTYPE(ctypes.c_char_p, ctypes.py_object)(("PyCapsule_GetName", ctypes.pythonapi))
    address = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
        ("PyCapsule_GetPointer", ctypes.pythonapi)
    )
    return ctypes.CFUNCTYPE(None)(address(capsule, signature(capsule)))


_DSYTRD, _DSTEMR, _DORMTR = (_routine(name) for name in ("dsytrd", "dstemr", "dormtr"))


def _run(routine: Callable[..., None], *arguments: object, workspaces: int) -> None:
    """Call a routine whose last arguments are one or two workspaces (float64, then int), each with its length."""
    asked: list[np.ndarray] = [np.empty(1), np.empty(1, dtype=np.intc)][:workspaces]
    _call(routine, *arguments, *(word for space in asked for word in (space, -1)))  # how long should they be?
    spaces = [np.empty(max(1, int(space[0])), dtype=space.dtype) for space in asked]
    _call(routine, *arguments, *(word for space in spaces for word in (space, len(space))))


def _call(routine: Callable[..., None], *arguments: object) -> None:
    info = ctypes.c_int()
    routine(*(_passed(argument) for argument in (*arguments, info)))
    if info.value:
        raise LinAlgError(f"a LAPACK routine returned the code {info.value}")


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
