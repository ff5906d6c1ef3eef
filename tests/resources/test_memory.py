"""What is free, and a heap that keeps or gives back what is freed."""

from __future__ import annotations

import subprocess
import sys

import pytest

from lowrank_compress.resources.memory import free_memory

# Frees eight tensors of 8 MB and prints what of them still counts as the process's.
FREED = """
import numpy as np
from lowrank_compress.resources.memory import give_back_freed, keep_freed

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

SETTING()
before = resident()
tensors = [np.ones(1 << 20) for _ in range(8)]
del tensors
print(resident() - before)
"""


def test_what_is_free_is_a_share_of_what_there_is() -> None:
    assert 1 << 20 < free_memory() < 1 << 50


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_freed_tensors_are_kept_or_given_back() -> None:
    left = {
        setting: int(subprocess.check_output([sys.executable, "-c", FREED.replace("SETTING", setting)]))
        for setting in ("keep_freed", "give_back_freed")
    }
    assert left["keep_freed"] > 60 << 20
    assert left["give_back_freed"] < 4 << 20
