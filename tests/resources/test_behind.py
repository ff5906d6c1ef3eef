from __future__ import annotations

import threading
from functools import partial

import pytest

from lowrank_compress.resources.behind import Behind


def test_work_is_done_in_order_while_the_caller_goes_on() -> None:
    behind, gate, done = Behind(), threading.Event(), []
    behind.do(lambda: done.append(gate.wait(30)))
    for number in range(3):
        behind.do(partial(done.append, number))
    assert done == []
    gate.set()
    behind.flush()
    assert done == [True, 0, 1, 2]


def test_a_failure_is_raised_when_it_settles_and_once() -> None:
    behind, done = Behind(), []
    behind.do(lambda: done.append(1 // 0))
    with pytest.raises(ZeroDivisionError):
        behind.flush()
    behind.do(lambda: done.append(1))
    behind.flush()
    assert done == [1]
