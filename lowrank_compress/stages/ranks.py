"""ranks.json: how each matrix is to be stored; small, readable, and made to be edited by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowrank_compress.allocation.storage import largest_rank
from lowrank_compress.artifacts.documents import read_json
from lowrank_compress.artifacts.files import write_text
from lowrank_compress.artifacts.tensors import BlockFiles
from lowrank_compress.errors import ArtifactError
from lowrank_compress.methods.matrix_unit import MatrixUnit
from lowrank_compress.methods.sites import Site
from lowrank_compress.methods.units import Unit, stored_elements

RANKS = "ranks.json"
SCHEMA = 1


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
    write_text(path, f'{{\n  "schema": {SCHEMA},\n  "matrices": {{\n' + ",\n".join(lines) + "\n  }\n}\n")


def read_ranks(path: Path, sites: Sequence[Site]) -> dict[str, Choice]:
    """Read ranks.json and check that it fits a model: of each part of a block it has the units of one alternative.

    Raises
    ------
    ArtifactError
        It does not parse, names other matrices, or a rank or format does not fit; the message says which.
    """
    found = read_json(path)
    matrices: dict[str, Any] = found.get("matrices", {})
    if found.keys() != {"schema", "matrices"} or found["schema"] != SCHEMA or not _is_table(matrices):
        raise ArtifactError(
            f'{path} does not have the form {{"schema": {SCHEMA}, "matrices": {{NAME: {{"shape": …, "format": …, '
            '"rank": …}}}.'
        )
    units = [unit for site in sites for unit in _present(site, matrices)]
    missing = [unit.name for unit in units if unit.name not in matrices]
    extra = sorted(set(matrices) - {unit.name for unit in units})
    if missing or extra:
        raise ArtifactError(
            f"{path} does not fit the model: "
            + (f"it lacks {missing[0]}" if missing else f"it names {extra[0]}, which the model does not have")
            + ". Correct it, or repeat `lrc score` with --overwrite."
        )
    return {unit.name: _choice(path, unit, matrices[unit.name]) for unit in units}


def _is_table(matrices: object) -> bool:
    return isinstance(matrices, dict) and all(
        isinstance(entry, dict) and entry.keys() <= {"shape", "format", "rank"} for entry in matrices.values()
    )


def _choice(path: Path, unit: Unit, entry: Mapping[str, Any]) -> Choice:
    """Read one line; refuse, besides what is none, a rank that stores no less than dense."""
    if entry.get("shape", list(unit.shape)) != list(unit.shape):
        raise ArtifactError(
            f"{path}: {unit.name} has shape {entry['shape']!r}; it is {list(unit.shape)} in the model, and cannot be "
            "changed here."
        )
    form, rank = entry.get("format"), entry.get("rank")
    if form == "dense" and rank is None:
        return Choice("dense", None)
    if form not in unit.formats:
        raise ArtifactError(
            f"{path}: {unit.name} has format {form!r} and rank {rank!r}; expected one of {', '.join(unit.formats)} "
            'with a rank, or "dense" with rank null.'
        )
    largest = unit.largest(form)
    if type(rank) is not int or not 1 <= rank <= largest or rank % unit.step:
        even = " that is even" if unit.step == 2 else ""
        ranks = (
            f"from 1 to {largest}{even} (more stores no less than dense)" if largest else "null: no rank stores less"
        )
        raise ArtifactError(
            f"{path}: {unit.name} has format {form!r} and rank {rank!r}; expected a rank {ranks}, or "
            '"dense" with rank null.'
        )
    return Choice(form, rank)


def in_storage(units: Sequence[Unit], choices: Mapping[str, Choice], storage: str, multiple: int) -> dict[str, Choice]:
    """Choices in another storage: of each unit that has it, the largest rank at its stored count.

    Parameters
    ----------
    storage
        "pair", "pivot" or "auto".
    multiple
        Ranks are multiples of it where it leaves one.
    """
    found = dict(choices)
    for unit in units:
        choice = choices[unit.name]
        if choice.rank is None or storage not in unit.formats or choice.format == storage:
            continue
        rows, columns = unit.shape
        count = stored_elements(unit, choice.format, choice.rank)
        rank = min(largest_rank(storage, (rows, columns), count), unit.largest(storage))
        found[unit.name] = Choice(storage, max(rank - rank % multiple or rank, 1))
    return found


def require_kept(path: Path, units: Sequence[Unit], choices: Mapping[str, Choice], bases: BlockFiles) -> None:
    """Make sure that the decompositions were kept up to the ranks that are asked for.

    Raises
    ------
    ArtifactError
        One was not; the message says which.
    """
    advice = (
        "or have all ranks kept that can pay: `lrc compress` with the run's options, --allocate loss and --overwrite "
        f"(what {path.name} says now becomes {path.name}.bak)."
    )
    shapes = {block: bases.shapes(block) for block in sorted({unit.block for unit in units})}
    for unit in units:
        choice, shape = choices[unit.name], shapes[unit.block]
        if choice.rank is None:
            continue
        if not any(name.startswith(f"{unit.name}/") for name in shape):
            raise ArtifactError(
                f"{path}: {unit.name} was not decomposed, because another way to store that part was taken. Leave it "
                f"as it was, {advice}"
            )
        if isinstance(unit, MatrixUnit) and choice.rank > (kept := unit.kept(shape)):
            raise ArtifactError(
                f"{path}: {unit.name} asks for rank {choice.rank} ({choice.format}), but its basis was kept up to rank "
                f"{kept}. Ask for no more, {advice}"
            )


def _present(site: Site, matrices: Mapping[str, Any]) -> tuple[Unit, ...]:
    """Return the alternative whose units are there, or the first."""
    whole = (way for way in site.alternatives if all(unit.name in matrices for unit in way))
    return next(whole, site.alternatives[0])
