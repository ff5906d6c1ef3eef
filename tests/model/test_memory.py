"""What is free, and a heap that keeps or gives back what is freed."""

from __future__ import annotations

import subprocess
import sys

import pytest

from lowrank_compress.model.memory import HEAP, Heap, free_memory

# Frees eight tensors of 8 MB in the given setting and prints what of them still counts as the process's.
FREED = """
import numpy as np
from lowrank_compress.model.memory import HEAP

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

def kept():
    before = resident()
    tensors = [np.ones(1 << 20) for _ in range(8)]
    del tensors
    return resident() - before

getattr(HEAP, "SETTING")()
INSIDE
"""


def run(setting: str, inside: str) -> list[int]:
    code = FREED.replace("SETTING", setting).replace("INSIDE", inside)
    return [int(word) for word in subprocess.check_output([sys.executable, "-c", code], text=True).split()]


def test_what_is_free_is_a_share_of_what_there_is() -> None:
    assert 1 << 20 < free_memory() < 1 << 50


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_freed_tensors_are_kept_or_given_back() -> None:
    (kept,) = run("keep", "print(kept())")
    (given,) = run("give_back", "print(kept())")
    assert kept > 60 << 20
    assert given < 4 << 20


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_giving_back_for_a_while_begins_with_what_was_kept() -> None:
    inside = """
start = resident()
before = kept()
with HEAP.giving_back():
    during = resident() - start, kept()
print(before, *during, kept())
"""
    before, left, during, after = run("keep", inside)
    assert before > 60 << 20
    assert left < 4 << 20
    assert during < 4 << 20
    assert after > 60 << 20


def test_a_heap_that_keeps_nothing_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[int] = []
    heap = Heap()
    monkeypatch.setattr(heap, "_set", lambda parameter, value: called.append(parameter))
    with heap.giving_back():
        pass
    assert called == []
    assert not HEAP._keeps
