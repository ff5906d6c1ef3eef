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
from lowrank_compress.methods.candidates import Candidates
from lowrank_compress.methods.groups import TargetGroup, cheaper

RANKS = "ranks.json"
SCHEMA = 1


def write_ranks(path: Path, groups: Sequence[TargetGroup], choices: Mapping[str, Choice]) -> None:
    """Write ranks.json: one matrix or module a line, for people to read and edit."""
    lines = [
        f"    {json.dumps(group.name)}: " + json.dumps({"shape": list(group.shape), **entry_of(group, choice)})
        for group in groups
        for choice in [choices[group.name]]
    ]
    write_text(path, f'{{\n  "schema": {SCHEMA},\n  "matrices": {{\n' + ",\n".join(lines) + "\n  }\n}\n")


def entry_of(group: TargetGroup, choice: Choice) -> dict[str, Any]:
    """Spell a choice: its format and its parameters by name, of which dense has none."""
    if choice.is_dense:
        return {"format": "dense", "rank": None}
    named = zip(group.parameters(choice.format), choice.parameters, strict=True)
    return {"format": choice.format, **dict(named)}


def choice_of(group: TargetGroup, entry: Mapping[str, Any]) -> Choice:
    """Read what `entry_of` spelled."""
    form = entry["format"]
    return DENSE if form == "dense" else Choice(form, tuple(entry[name] for name in group.parameters(form)))


def read_ranks(path: Path, candidates: Sequence[Candidates]) -> dict[str, Choice]:
    """Read ranks.json and check that it fits a model: of each part of a block it has the groups of one alternative.

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
    groups = [group for part in candidates for group in _present(part, matrices)]
    missing = [group.name for group in groups if group.name not in matrices]
    extra = sorted(set(matrices) - {group.name for group in groups})
    if missing or extra:
        raise ArtifactError(
            f"{path} does not fit the model: "
            + (f"it lacks {missing[0]}" if missing else f"it names {extra[0]}, which the model does not have")
            + ". Correct it, or repeat `lrc score` with --overwrite."
        )
    return {group.name: _choice(path, group, matrices[group.name]) for group in groups}


def _is_table(matrices: object) -> bool:
    return isinstance(matrices, dict) and all(
        isinstance(entry, dict) and entry.keys() <= {"shape", "format", "rank"} for entry in matrices.values()
    )


def _choice(path: Path, group: TargetGroup, entry: Mapping[str, Any]) -> Choice:
    """Read one line; refuse, besides what is none, a choice that stores no less than dense."""
    if entry.get("shape", list(group.shape)) != list(group.shape):
        raise ArtifactError(
            f"{path}: {group.name} has shape {entry['shape']!r}; it is {list(group.shape)} in the model, and cannot be "
            "changed here."
        )
    form = entry.get("format")
    given = {name: value for name, value in entry.items() if name not in ("shape", "format")}
    if form == "dense" and all(value is None for value in given.values()):
        return DENSE
    if form not in group.formats:
        raise ArtifactError(
            f"{path}: {group.name} has format {form!r} and {_spelled(given)}; expected one of "
            f'{", ".join(group.formats)} with a rank, or "dense" with rank null.'
        )
    names, choices = group.parameters(form), group.choices(form)
    values = tuple(given.get(name) for name in names)
    if given.keys() <= set(names) and all(type(value) is int for value in values):
        found = np.flatnonzero((choices.parameters == np.array(values, dtype=object)).all(axis=1))
        if len(found):
            return choices[int(found[0])]
    raise ArtifactError(
        f"{path}: {group.name} has format {form!r} and {_spelled(given)}; expected {_possible(names, choices)}, or "
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


def in_storage(
    groups: Sequence[TargetGroup], choices: Mapping[str, Choice], storage: str, multiple: int
) -> dict[str, Choice]:
    """Choices in another storage: of each group that has it, the largest one at its stored count.

    Parameters
    ----------
    storage
        "pair", "pivot" or "auto".
    multiple
        Ranks are multiples of it where it leaves one.
    """
    found = dict(choices)
    for group in groups:
        choice = choices[group.name]
        if choice.is_dense or storage not in group.formats or choice.format == storage:
            continue
        stored = group.price(choice).elements
        found[group.name] = (
            cheaper(group, storage, stored, multiple) or cheaper(group, storage, stored) or group.choices(storage)[0]
        )
    return found


def require_kept(path: Path, groups: Sequence[TargetGroup], choices: Mapping[str, Choice], bases: BlockFiles) -> None:
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
    shapes = {block: bases.shapes(block) for block in sorted({group.block for group in groups})}
    for group in groups:
        choice, shape = choices[group.name], shapes[group.block]
        if choice.is_dense:
            continue
        if not any(name.startswith(f"{group.name}/") for name in shape):
            raise ArtifactError(
                f"{path}: {group.name} was not decomposed, because another way to store that part was taken. Leave it "
                f"as it was, {advice}"
            )
        if (kept := group.kept(shape)) is not None and (rank := group.keep(choice)) > kept:
            raise ArtifactError(
                f"{path}: {group.name} asks for rank {rank} ({choice.format}), but its basis was kept up to rank "
                f"{kept}. Ask for no more, {advice}"
            )


def _present(part: Candidates, matrices: Mapping[str, Any]) -> tuple[TargetGroup, ...]:
    """Return the alternative whose groups are there, or the first."""
    whole = (groups for groups in part.each if all(group.name in matrices for group in groups))
    return next(whole, part.each[0])
