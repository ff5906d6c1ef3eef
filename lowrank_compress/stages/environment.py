"""Where a stage computes: its device, and the record of versions and machine that goes into a manifest."""

from __future__ import annotations

import platform
from typing import Any

import numpy
import scipy
import torch
import transformers

import lowrank_compress
from lowrank_compress.errors import InputError
from lowrank_compress.stages.hardware import hardware

# Tokens a micro-batch unless the recipe says otherwise, on a CPU and on a GPU: little memory, and much work at once. A
# result depends on it in the last bits, so it is in the key.
MICRO_BATCH_TOKENS = {"cpu": 1024, "cuda": 8192}


def micro_batch(device: str, seq_len: int) -> int:
    """How many windows are computed at once, where nobody says."""
    return max(1, MICRO_BATCH_TOKENS[torch.device(device).type] // seq_len)


def compute_device(name: str) -> torch.device:
    """Resolve ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.

    Raises
    ------
    InputError
        There is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"Unknown device {name!r}; expected auto, cpu, cuda or cuda:N.") from None
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"The device {name} is not supported; expected auto, cpu, cuda or cuda:N.")
    if device.type == "cpu":
        return torch.device("cpu")  # there is one, whatever its number
    if not torch.cuda.is_available():
        raise InputError(f"The device {name} was asked for, but this torch sees no GPU. Use --device cpu.")
    if (device.index or 0) >= (count := torch.cuda.device_count()):
        raise InputError(f"The device {name} was asked for, but this torch sees {count} GPUs, from cuda:0 on.")
    return device


def environment(device: str) -> dict[str, Any]:
    """Record where a result was computed."""
    return {
        "lowrank_compress": lowrank_compress.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": numpy.__version__,
        "scipy": scipy.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "device": device if device == "cpu" else torch.cuda.get_device_name(device),
        **hardware(),
    }
