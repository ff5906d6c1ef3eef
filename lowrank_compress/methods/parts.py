"""Parts of a block that may have a method of their own, and what names them: a group, a role, or a shell pattern."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

from lowrank_compress.arch.spec import HEAD, Architecture
from lowrank_compress.arch.targets import Resolved, Target
from lowrank_compress.errors import InputError, UnsupportedError
from lowrank_compress.recipe import PART_OPTIONS, Recipe
from lowrank_compress.registry import unknown

# Names of several groups together.
TOGETHER: Mapping[str, tuple[str, ...]] = {"attention": ("qk", "vo", "latent"), "mlp": ("mlp", "experts")}


def own_methods(recipe: Recipe) -> dict[str, str]:
    """Return the method of each part that has one of its own, by what names the part.

    Raises
    ------
    InputError
        A part has two of them.
    """
    short = {name: method for name in PART_OPTIONS if (method := getattr(recipe, name)) is not None}
    for name in short.keys() & recipe.methods.keys():
        if short[name] != (other := recipe.methods[name]):
            raise InputError(f"--{name} {short[name]} and --for {name}={other} are two methods for one part. Give one.")
    return short | recipe.methods


def groups_of(name: str, architecture: Architecture) -> tuple[str, ...]:
    """Groups of an architecture that a name stands for; none if it is a role or a pattern."""
    wanted = TOGETHER.get(name, (name,))
    return tuple(group.name for group in (*architecture.groups, HEAD) if group.name in wanted)


def flag_of(name: str) -> str:
    """The option that gives a part its method."""
    return f"--{name}" if name in PART_OPTIONS else f"--for {name}"


def require_known(names: Iterable[str], resolved: Resolved) -> None:
    """Refuse a name that is of no part of a model.

    Raises
    ------
    InputError
        It is no group, and neither role of a matrix nor pattern over names that any matrix of the model has.
    """
    architecture, targets = resolved.architecture, (*resolved.targets, *resolved.outside)
    groups, roles = (group.name for group in architecture.groups), dict.fromkeys(target.role for target in targets)
    known = list(dict.fromkeys([*(name for name in TOGETHER if groups_of(name, architecture)), *groups, *roles]))
    for name in names:
        if name == HEAD.name and not resolved.outside:
            raise UnsupportedError(
                "This model has no head of its own to compress: it is no language model, or its head shares its weight "
                "with the embedding, which stays as it is."
            )
        if name not in known and not any(fnmatchcase(target.name, name) for target in targets):
            raise InputError(
                f"{unknown('part of a block', name, known)} A shell pattern names matrices, such as "
                f"{resolved.targets[-1].name!r}; {name!r} is that of none in this model."
            )


def deciding(target: Target, methods: Mapping[str, str]) -> str | None:
    """The entry that decides the method of a matrix: a pattern over its name, else its role, else its group.

    Raises
    ------
    InputError
        Two patterns are for it, and have different methods.
    """
    patterns = [name for name in methods if fnmatchcase(target.name, name)]
    if len({methods[name] for name in patterns}) > 1:
        raise InputError(
            f"The patterns {' and '.join(map(repr, patterns[:2]))} are both for {target.name}, and name different "
            "methods. Make them exclude one another."
        )
    return next((key for key in (*patterns, target.role, target.group) if key in methods), None)
