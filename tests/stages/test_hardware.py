"""The record of a machine names what changes last bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lowrank_compress.stages.environment import environment
from lowrank_compress.stages.hardware import SETTINGS, hardware, processor

INTEL = """processor\t: 0
vendor_id\t: GenuineIntel
cpu family\t: 6
model\t\t: 143
model name\t: Intel(R) Xeon(R) Platinum 8480C
flags\t\t: fpu vme

processor\t: 1
model name\t: something else
"""


def test_names_the_processor(tmp_path: Path):
    (tmp_path / "cpuinfo").write_text(INTEL)
    assert processor(tmp_path / "cpuinfo") == "Intel(R) Xeon(R) Platinum 8480C (family 6, model 143)"
    assert processor(tmp_path / "missing") != ""


def test_names_kernels_and_choices_of_them(monkeypatch: pytest.MonkeyPatch):
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)
    assert hardware()["settings"] == {}
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    found = hardware()
    assert found["settings"] == {"MKL_CBWR": "COMPATIBLE"}
    assert found["kernels"] == torch.backends.cpu.get_cpu_capability()
    assert "openblas" in found["blas"] or "mkl" in found["blas"]
    assert found["processes"] == 1


def test_is_part_of_every_record_of_an_environment():
    assert hardware().items() <= environment("cpu").items()
