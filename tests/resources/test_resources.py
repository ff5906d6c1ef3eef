from __future__ import annotations

import threading

import pytest

from lowrank_compress.resources.memory import free_memory
from lowrank_compress.resources.resources import Resources
from lowrank_compress.resources.workers import Workers

MUCH = 1 << 40


def test_what_is_free_is_shared_and_what_is_given_is_for_each() -> None:
    free = free_memory()
    assert Resources(1000, Workers(0, 4)).budget == 1000
    assert free / 8 < Resources(workers=Workers(0, 4)).budget < free / 2
    assert Resources(1000).for_states == Resources(1000).for_decompositions == 500


@pytest.mark.parametrize(
    ("device", "threads", "memory", "expected"),
    [
        ("cpu", 4, MUCH, 4),
        ("cpu", 4, 1, 1),
        ("cpu", 1, MUCH, 1),
        ("cpu", 99, MUCH, 8),
        ("cuda", 4, MUCH, 1),
        # Two blocks' statistics may fill half of a half of the memory.
        ("cpu", 4, 8 * 1000, 2),
        ("cpu", 4, 8 * 1000 - 2, 1),
    ],
)
def test_blocks_at_once(device: str, threads: int, memory: int, expected: int) -> None:
    assert Resources(memory, threads=threads).on(device).blocks_at_once(1000) == expected


@pytest.mark.parametrize(
    ("device", "memory", "expected"),
    [("cpu", 6000, 3), ("cpu", 5998, 2), ("cpu", 1, 1), ("cpu", MUCH, 4), ("cuda:1", MUCH, 1)],
)
def test_the_largest_piece_of_work_decides_how_many_there_are_at_a_time(
    device: str, memory: int, expected: int
) -> None:
    resources = Resources(memory, threads=4).on(device)
    assert resources.items_at_once([10, 1000, 200]) == expected


def test_the_largest_begins_first_and_items_keep_what_was_found() -> None:
    begun: list[int] = []

    def work(item: int) -> int:
        begun.append(item)
        return item**2

    found = Resources(MUCH, threads=1).each(work, [2, 9, 4], lambda item: item)
    assert begun == [9, 4, 2]
    assert sorted(found) == [(2, 4), (4, 16), (9, 81)]
    assert Resources(MUCH).each(work, [], lambda item: item) == []


def test_on_a_gpu_work_stays_in_the_thread_that_asks_for_it() -> None:
    found = Resources(MUCH).on("cuda").each(lambda item: threading.current_thread(), [1, 3], lambda item: item)
    assert found == [(1, threading.current_thread()), (3, threading.current_thread())]


def test_a_quarter_may_wait_and_half_may_be_used() -> None:
    resources = Resources(8000)
    assert resources.may_wait(1000)
    assert not resources.may_wait(1001)
    assert resources.may_keep_freed(4000)
    assert not resources.may_keep_freed(4001)
