from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_info, threadpool_limits

from lowrank_compress.resources.threads import in_threads


def blas_threads() -> list[int]:
    return [library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"]


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    with threadpool_limits(2, user_api="blas"):
        yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("at_once", [None, 1, 2, 9])
def test_each_item_has_one_thread(two_threads: None, at_once: int | None) -> None:
    def work(item: int) -> tuple[int, int, list[int], str]:
        np.linalg.eigvalsh(np.eye(4))
        return item**2, torch.get_num_threads(), blas_threads(), threading.current_thread().name

    found = in_threads(work, range(5), at_once)
    assert [square for square, *_ in found] == [0, 1, 4, 9, 16]
    assert {threads for _, threads, *_ in found} == {1}
    assert all(set(threads) == {1} for _, _, threads, _ in found)
    assert len({name for *_, name in found}) <= min(at_once or 2, 2)
    assert torch.get_num_threads() == 2
    assert set(blas_threads()) == {2}


def test_as_many_at_once_as_torch_has_threads(two_threads: None) -> None:
    both = threading.Barrier(2, timeout=30)
    in_threads(lambda _: both.wait(), range(2))


def test_an_error_comes_through(two_threads: None) -> None:
    with pytest.raises(ZeroDivisionError):
        in_threads(lambda item: 1 / item, [1, 0, 2])
    assert torch.get_num_threads() == 2


def test_nothing_to_do() -> None:
    assert in_threads(lambda item: item, []) == []
