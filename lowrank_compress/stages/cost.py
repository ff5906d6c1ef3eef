"""What commands took that made something in a run: kept beside it, and no part of any result."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowrank_compress.artifacts.documents import read_sealed, write_sealed
from lowrank_compress.errors import ArtifactError
from lowrank_compress.stages.run import Run

COST = "cost.json"


def keep_cost(run: Run, command: str, cost: Mapping[str, Any]) -> None:
    """Write down what a command took, where it did anything; a file of that name that is not ours stays."""
    path, before = _path(run), read_cost(run)
    if not cost["seconds"] or (path.exists() and before is None):
        return
    write_sealed(path, {"commands": {**(before or {}), command: dict(cost)}})


def read_cost(run: Run) -> dict[str, Any] | None:
    """Read what the last command of each name took, by its name; None where that is not known."""
    try:
        return read_sealed(_path(run)).get("commands", {})
    except (ArtifactError, OSError):
        return None


def _path(run: Run) -> Path:
    return run.path / COST
