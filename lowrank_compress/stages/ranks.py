"""ranks.json: how each matrix is to be stored; small, readable, and made to be edited by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowrank_compress.artifacts.files import read_json, write_text
from lowrank_compress.errors import ArtifactError
from lowrank_compress.methods.sites import Site
from lowrank_compress.methods.units import Unit, full_rank

RANKS = "ranks.json"


@dataclass(frozen=True)
class Choice:
    """How one unit is to be stored.

    Attributes
    ----------
    format
        "pair", "pivot", "auto" (the better of both at the count of the cheaper), "width" (a narrower module) or
        "dense".
    rank
        r, or the width; None for dense.
    """

    format: str
    rank: int | None


def write_ranks(path: Path, units: Sequence[Unit], choices: Mapping[str, Choice]) -> None:
    """Write ranks.json: one matrix or module a line, for people to read and edit."""
    lines = [
        f"    {json.dumps(unit.name)}: "
        + json.dumps({"shape": list(unit.shape), "format": choice.format, "rank": choice.rank})
        for unit in units
        for choice in [choices[unit.name]]
    ]
    write_text(path, '{\n  "schema": 1,\n  "matrices": {\n' + ",\n".join(lines) + "\n  }\n}\n")


def read_ranks(path: Path, sites: Sequence[Site]) -> dict[str, Choice]:
    """Read ranks.json and check that it fits a model: of each part of a block it has the units of one alternative.

    Raises
    ------
    ArtifactError
        It does not parse, names other matrices, or a rank or format does not fit; the message says which.
    """
    found = read_json(path)
    matrices: dict[str, Any] = found.get("matrices", {})
    if not isinstance(matrices, dict) or not all(isinstance(entry, dict) for entry in matrices.values()):
        raise ArtifactError(f'{path} does not have the form {{"matrices": {{NAME: {{"format": …, "rank": …}}}}}}.')
    units = [unit for site in sites for unit in _present(site, matrices)]
    missing = [unit.name for unit in units if unit.name not in matrices]
    extra = sorted(set(matrices) - {unit.name for unit in units})
    if missing or extra:
        raise ArtifactError(
            f"{path} does not fit the model: "
            + (f"it lacks {missing[0]}" if missing else f"it names {extra[0]}, which the model does not have")
            + ". Correct it, or repeat `lrc score` with --overwrite."
        )
    choices = {}
    for unit in units:
        entry = matrices[unit.name]
        form, rank = entry.get("format"), entry.get("rank")
        if form == "dense" and rank is None:
            choices[unit.name] = Choice("dense", None)
            continue
        fits = type(rank) is int and 1 <= rank < full_rank(unit) and rank % unit.step == 0
        if form not in unit.formats or not fits:
            even = " that is even" if unit.step == 2 else ""
            raise ArtifactError(
                f"{path}: {unit.name} has format {form!r} and rank {rank!r}; expected one of {', '.join(unit.formats)} "
                f'with a rank from 1 to {full_rank(unit) - 1}{even}, or "dense" with rank null.'
            )
        choices[unit.name] = Choice(form, rank)
    return choices


def _present(site: Site, matrices: Mapping[str, Any]) -> tuple[Unit, ...]:
    """Return the alternative whose units are there, or the first."""
    whole = (way for way in site.alternatives if all(unit.name in matrices for unit in way))
    return next(whole, site.alternatives[0])
