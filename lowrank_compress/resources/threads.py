"""Several decompositions at a time on a CPU, each with one thread.

Half of a symmetric eigendecomposition is bound by memory or runs in one thread whatever it is given: threads do more on
matrices of their own than together on one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from threadpoolctl import threadpool_limits

Item = TypeVar("Item")
Found = TypeVar("Found")


def in_threads(work: Callable[[Item], Found], items: Sequence[Item], at_once: int | None = None) -> list[Found]:
    """Apply `work` to each item in a thread of its own, in which torch, NumPy and SciPy use no further ones.

    Parameters
    ----------
    work
        Spends its time outside of Python's lock, and changes nothing that the others read.
    items
        The first ones begin first.
    at_once
        How many at a time; None for as many as torch has threads. It changes no result: sums depend in their last
        bits on the threads that share them, and that is always one.

    Returns
    -------
    list
        In the items' order.
    """
    threads = torch.get_num_threads()
    at_once = max(1, min(at_once or threads, threads, len(items)))
    with threadpool_limits(1, user_api="blas"):
        try:
            with ThreadPoolExecutor(at_once, initializer=torch.set_num_threads, initargs=(1,)) as pool:
                return list(pool.map(work, items))
        finally:
            torch.set_num_threads(threads)  # what the pool's threads set is the default of all later ones
