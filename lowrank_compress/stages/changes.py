"""What may have made a run another than expected: its recipe, its inputs, the machine it was made on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lowrank_compress.artifacts.hashes import file_hashes
from lowrank_compress.errors import InputError
from lowrank_compress.model.checkpoint import Checkpoint
from lowrank_compress.recipe import Recipe
from lowrank_compress.stages.description import portable, weight_files
from lowrank_compress.stages.differences import Reference, tensor_differences, unlike
from lowrank_compress.stages.expectation import Expectation, Input, StageEntry
from lowrank_compress.stages.identity import checkpoint_id


@dataclass(frozen=True)
class Change:
    """Something that is another than expected; what is not there is "none"."""

    what: str
    expected: str
    found: str


def require_recipe(expectation: Expectation, recipe: Recipe) -> None:
    """Refuse to compare runs of different recipes.

    Raises
    ------
    InputError
        The recipe (defaults decided) is another one; an option that the expectation does not know has its default.
    """
    asked = portable(recipe)
    for name in sorted({*asked, *expectation.recipe}):
        known = Recipe.model_fields.get(name)
        default = None if known is None else known.get_default()
        there, here = expectation.recipe.get(name, default), asked.get(name, default)
        if there != here:
            raise InputError(
                f"The expectation is of another recipe: {name} is {there!r} there and {here!r} here. Pass the recipe "
                "it was written for, or write a new expectation with `lrc verify RUN --write`."
            )


def environment_changes(expected: Mapping[str, Any], found: Mapping[str, Any]) -> list[Change]:
    """Name what of two environments differs."""
    differing = unlike(_said(expected), _said(found))
    return [Change(name, one or "none", two or "none") for name, (one, two) in differing.items()]


def _said(environment: Mapping[str, Any]) -> dict[str, str]:
    """Spell what is there, in a line each."""
    lines = {
        name: ", ".join(f"{key}={entry}" for key, entry in value.items()) if isinstance(value, Mapping) else str(value)
        for name, value in environment.items()
        if value is not None
    }
    return {name: line for name, line in lines.items() if line}


def input_changes(expectation: Expectation, base: Checkpoint, text: Input | None) -> list[Change]:
    """Name what of the inputs is another than expected: the text, files and tensors of the model."""
    found = []
    if (expectation.text and expectation.text.id) != (text and text.id):
        found.append(Change("calibration text", *map(_input_said, (expectation.text, text))))
    if checkpoint_id(base) == expectation.base.id:
        return found
    for name, (one, two) in unlike(expectation.base.files, file_hashes(base.identity())).items():
        found.append(Change(f"base file {name}", _short(one), _short(two)))
    holding = StageEntry(id="", files={}, tensors=expectation.base.tensors, environment={})
    differing = tensor_differences("base", holding, weight_files(base), Reference({}))
    return found + [Change(f"base tensor {each.tensor}", "as written", each.problem) for each in differing]


def _input_said(given: Input | None) -> str:
    return "none" if given is None else f"{given.name} ({_short(given.id)})"


def _short(digest: str | None) -> str:
    return "none" if digest is None else digest[:12]
