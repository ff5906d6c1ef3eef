"""ranks.json: how each matrix is to be stored; small, readable, and made to be edited by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowrank_compress.allocation.storage import STORAGES, cost
from lowrank_compress.arch.resolve import Target
from lowrank_compress.artifacts.files import read_json, write_text
from lowrank_compress.errors import ArtifactError

RANKS = "ranks.json"
RANKS_BACKUP = "ranks.json.bak"


@dataclass(frozen=True)
class Choice:
    """How one matrix is to be stored.

    Attributes
    ----------
    format
        "pair", "pivot", "auto" (the better of both at the count of the cheaper) or "dense".
    rank
        r; None for dense.
    """

    format: str
    rank: int | None

    def stored(self, shape: tuple[int, int]) -> int:
        """Stored elements."""
        return shape[0] * shape[1] if self.rank is None else int(cost(self.format, shape, self.rank))


def write_ranks(path: Path, targets: Sequence[Target], choices: Mapping[str, Choice]) -> None:
    """Write ranks.json: one matrix a line, for people to read and edit."""
    lines = [
        f"    {json.dumps(target.name)}: "
        + json.dumps({"shape": list(target.shape), "format": choice.format, "rank": choice.rank})
        for target in targets
        for choice in [choices[target.name]]
    ]
    write_text(path, '{\n  "schema": 1,\n  "matrices": {\n' + ",\n".join(lines) + "\n  }\n}\n")


def read_ranks(path: Path, targets: Sequence[Target]) -> dict[str, Choice]:
    """Read ranks.json and check that it fits a model.

    Raises
    ------
    ArtifactError
        It does not parse, names other matrices, or a rank or format does not fit; the message says which.
    """
    found = read_json(path)
    matrices: dict[str, Any] = found.get("matrices", {})
    if not isinstance(matrices, dict) or not all(isinstance(entry, dict) for entry in matrices.values()):
        raise ArtifactError(f'{path} does not have the form {{"matrices": {{NAME: {{"format": …, "rank": …}}}}}}.')
    missing = [target.name for target in targets if target.name not in matrices]
    extra = sorted(set(matrices) - {target.name for target in targets})
    if missing or extra:
        raise ArtifactError(
            f"{path} does not fit the model: "
            + (f"it lacks {missing[0]}" if missing else f"it names {extra[0]}, which the model does not have")
            + ". Correct it, or repeat `lrc score` with --overwrite."
        )
    choices = {}
    for target in targets:
        entry = matrices[target.name]
        form, rank = entry.get("format"), entry.get("rank")
        if form == "dense" and rank is None:
            choices[target.name] = Choice("dense", None)
            continue
        if form not in STORAGES or type(rank) is not int or not 1 <= rank < min(target.shape):
            raise ArtifactError(
                f"{path}: {target.name} has format {form!r} and rank {rank!r}; expected one of {', '.join(STORAGES)} "
                "with a "
                f'rank from 1 to {min(target.shape) - 1}, or "dense" with rank null.'
            )
        choices[target.name] = Choice(form, rank)
    return choices
