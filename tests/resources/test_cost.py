from __future__ import annotations

import time

import torch

from lowrank_compress.resources.cost import Meter, peak_memory
from lowrank_compress.stages.reporting import Silent


def test_time_and_peak_belong_to_the_step_that_reports_next() -> None:
    peaks = iter([100, 100, 300, 300, 300, 300])
    meter = Meter(Silent(), lambda: next(peaks))
    time.sleep(0.05)
    meter.advance("first", 1, 1)
    meter.advance("second", 1, 2)
    meter.advance("second", 2, 2)
    time.sleep(0.05)
    meter.advance("first", 1, 1)
    cost = meter.cost()
    assert list(cost["seconds"]) == ["first", "second"]
    assert cost["seconds"]["first"] >= 0.1
    assert (cost["peak_step"], cost["peak_bytes"], cost["start_bytes"]) == ("second", 300, 100)


def test_what_is_held_is_in_the_peak() -> None:
    held = torch.ones(50_000_000)
    assert peak_memory() > held.nbytes
