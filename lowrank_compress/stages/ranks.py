"""ranks.json: how each matrix is to be stored; small, readable, and made to be edited by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lowrank_compress.allocation.choice import DENSE, Choice, Choices
from lowrank_compress.artifacts.documents import read_json
from lowrank_compress.artifacts.files import write_text
from lowrank_compress.artifacts.tensors import BlockFiles
from lowrank_compress.errors import ArtifactError
from lowrank_compress.methods.sites import Site
from lowrank_compress.methods.units import Unit, cheaper

RANKS = "ranks.json"
SCHEMA = 1


def write_ranks(path: Path, units: Sequence[Unit], choices: Mapping[str, Choice]) -> None:
    """Write ranks.json: one matrix or module a line, for people to read and edit."""
    lines = [
        f"    {json.dumps(unit.name)}: " + json.dumps({"shape": list(unit.shape), **entry_of(unit, choice)})
        for unit in units
        for choice in [choices[unit.name]]
    ]
    write_text(path, f'{{\n  "schema": {SCHEMA},\n  "matrices": {{\n' + ",\n".join(lines) + "\n  }\n}\n")


def entry_of(unit: Unit, choice: Choice) -> dict[str, Any]:
    """Spell a choice: its format and its parameters by name, of which dense has none."""
    if choice.is_dense:
        return {"format": "dense", "rank": None}
    named = zip(unit.parameters(choice.format), choice.parameters, strict=True)
    return {"format": choice.format, **dict(named)}


def choice_of(unit: Unit, entry: Mapping[str, Any]) -> Choice:
    """Read what `entry_of` spelled."""
    form = entry["format"]
    return DENSE if form == "dense" else Choice(form, tuple(entry[name] for name in unit.parameters(form)))


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
    """Read one line; refuse, besides what is none, a choice that stores no less than dense."""
    if entry.get("shape", list(unit.shape)) != list(unit.shape):
        raise ArtifactError(
            f"{path}: {unit.name} has shape {entry['shape']!r}; it is {list(unit.shape)} in the model, and cannot be "
            "changed here."
        )
    form = entry.get("format")
    given = {name: value for name, value in entry.items() if name not in ("shape", "format")}
    if form == "dense" and all(value is None for value in given.values()):
        return DENSE
    if form not in unit.formats:
        raise ArtifactError(
            f"{path}: {unit.name} has format {form!r} and {_spelled(given)}; expected one of {', '.join(unit.formats)} "
            'with a rank, or "dense" with rank null.'
        )
    names, choices = unit.parameters(form), unit.choices(form)
    values = tuple(given.get(name) for name in names)
    if given.keys() <= set(names) and all(type(value) is int for value in values):
        found = np.flatnonzero((choices.parameters == np.array(values, dtype=object)).all(axis=1))
        if len(found):
            return choices[int(found[0])]
    raise ArtifactError(
        f"{path}: {unit.name} has format {form!r} and {_spelled(given)}; expected {_possible(names, choices)}, or "
        '"dense" with rank null.'
    )


def _spelled(given: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value!r}" for name, value in given.items()) or "rank None"


def _possible(names: Sequence[str], choices: Choices) -> str:
    """Say what the parameters of a format may be."""
    if not len(choices):
        return " and ".join(f"a {name} null: no {name} stores less" for name in names)
    said = []
    for name, values in zip(names, choices.parameters.T, strict=True):
        even = " that is even" if not (values % 2).any() else ""
        said.append(f"a {name} from {1 if not even else values.min()} to {values.max()}{even}")
    return f"{' and '.join(said)} (more stores no less than dense)"


def in_storage(units: Sequence[Unit], choices: Mapping[str, Choice], storage: str, multiple: int) -> dict[str, Choice]:
    """Choices in another storage: of each unit that has it, the largest one at its stored count.

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
        if choice.is_dense or storage not in unit.formats or choice.format == storage:
            continue
        stored = unit.price(choice).elements
        found[unit.name] = (
            cheaper(unit, storage, stored, multiple) or cheaper(unit, storage, stored) or unit.choices(storage)[0]
        )
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
        if choice.is_dense:
            continue
        if not any(name.startswith(f"{unit.name}/") for name in shape):
            raise ArtifactError(
                f"{path}: {unit.name} was not decomposed, because another way to store that part was taken. Leave it "
                f"as it was, {advice}"
            )
        if (kept := unit.kept(shape)) is not None and (rank := unit.keep(choice)) > kept:
            raise ArtifactError(
                f"{path}: {unit.name} asks for rank {rank} ({choice.format}), but its basis was kept up to rank "
                f"{kept}. Ask for no more, {advice}"
            )


def _present(site: Site, matrices: Mapping[str, Any]) -> tuple[Unit, ...]:
    """Return the alternative whose units are there, or the first."""
    whole = (way for way in site.alternatives if all(unit.name in matrices for unit in way))
    return next(whole, site.alternatives[0])
