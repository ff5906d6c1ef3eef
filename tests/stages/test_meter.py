from __future__ import annotations

import time

import torch

from lowrank_compress.stages.common import Silent
from lowrank_compress.stages.meter import Meter


def test_time_and_peak_belong_to_the_step_that_reports_next() -> None:
    meter = Meter(Silent())
    time.sleep(0.05)
    meter.advance("first", 1, 1)
    held = torch.ones(100_000_000)
    meter.advance("second", 1, 2)
    del held
    meter.advance("second", 2, 2)
    time.sleep(0.05)
    meter.advance("first", 1, 1)
    cost = meter.cost()
    assert list(cost["seconds"]) == ["first", "second"]
    assert cost["seconds"]["first"] >= 0.1
    assert cost["peak_step"] == "second" or cost["start_bytes"] > 600_000_000  # other tests may have used more
    assert cost["peak_bytes"] >= cost["start_bytes"] > 0
