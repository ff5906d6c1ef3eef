"""What of a machine changes the last bits of a result: its processor, the libraries' kernels for it, processes."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch
from threadpoolctl import threadpool_info

# Variables by which users choose other kernels than the processor's best, and whose effect nothing else here shows.
SETTINGS = ("MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA")


def hardware() -> dict[str, Any]:
    """Record the processor, the kernels that are used on it, and how many processes work together."""
    together = torch.distributed.is_available() and torch.distributed.is_initialized()
    return {
        "system": platform.system(),
        "processor": processor(),
        "kernels": torch.backends.cpu.get_cpu_capability(),
        "blas": blas(),
        "settings": {name: os.environ[name] for name in SETTINGS if name in os.environ},
        "processes": torch.distributed.get_world_size() if together else 1,
    }


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Name the kind of processor."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").split("\n\n")[0].splitlines()
    except OSError:
        lines = []
    found = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    if "model name" in found:
        family, model = (found.get(name, "?") for name in ("cpu family", "model"))
        return f"{found['model name']} (family {family}, model {model})"
    return platform.processor() or platform.machine()


def blas() -> str:
    """Name the libraries for linear algebra: versions, and which processor each takes this one for."""
    found = {
        f"{library['internal_api']} {library['version']} ({library.get('architecture', 'unknown')})"
        for library in threadpool_info()
        if library["user_api"] == "blas"
    }
    # torch links its own statically, where nobody sees it.
    return ", ".join(sorted(found) + (["mkl in torch"] if torch.backends.mkl.is_available() else []))
