"""What the last command took that made something in a run: kept beside it, and no part of any result."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowrank_compress.artifacts.documents import read_sealed, write_sealed
from lowrank_compress.errors import ArtifactError
from lowrank_compress.stages.run import Run

COST = "cost.json"


def keep_cost(run: Run, cost: Mapping[str, Any]) -> None:
    """Write down what a run took, where anything was done; a file of that name that is not ours stays."""
    path = _path(run)
    if not cost["seconds"] or (path.exists() and read_cost(run) is None):
        return
    write_sealed(path, dict(cost))


def read_cost(run: Run) -> dict[str, Any] | None:
    """Read what a run took; None where that is not known."""
    try:
        return read_sealed(_path(run))
    except (ArtifactError, OSError):
        return None


def _path(run: Run) -> Path:
    return run.path / COST
