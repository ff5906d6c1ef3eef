"""From the names of methods that a user gives to the method of each part of a block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from lowrank_compress.arch.resolve import Resolved
from lowrank_compress.arch.spec import BLOCK_GROUPS, Architecture, Group
from lowrank_compress.config import ModuleMetric, Scheme
from lowrank_compress.errors import InputError
from lowrank_compress.methods.cr import unit_members
from lowrank_compress.methods.linear import LinearMethod
from lowrank_compress.methods.mixture import Mixture
from lowrank_compress.methods.module import ModuleMethod
from lowrank_compress.methods.table import METHODS
from lowrank_compress.recipe import Recipe
from lowrank_compress.registry import unknown

DENSE = "dense"
OR = "|"  # between alternatives: the one that loses less is taken, block by block


def scheme_of(recipe: Recipe, architecture: Architecture) -> tuple[Scheme, tuple[str, ...]]:
    """Decide the method of each part of a block: its own option, else that of the attention, else `method`.

    A module method stands for the parts it is for, a mixture for all of its parts; what neither covers stays dense.
    Alternatives (a linear and a module method) stand with a bar between them. Where an architecture forbids to make
    queries and keys narrower, a mixture uses its other alternative, or the linear method that it names for that case.

    Returns
    -------
    tuple
        The scheme, and what a user should know about it.

    Raises
    ------
    InputError
        A method is unknown or not for that part, or a metric is given where there is no module method.
    """
    asked = {
        "qk": recipe.qk or recipe.attention or recipe.method,
        "vo": recipe.vo or recipe.attention or recipe.method,
        "mlp": recipe.mlp or recipe.method,
    }
    names = {group.name: _part(asked[group.name], group) for group in BLOCK_GROUPS}
    covered: dict[str, tuple[str, ...]] = {"attention": ("qk", "vo"), "qk": ("qk",), "vo": ("vo",), "mlp": ("mlp",)}
    for option, groups in covered.items():
        given = getattr(recipe, option)
        if given not in (None, DENSE) and all(names[group] == DENSE for group in groups):
            raise InputError(
                f"The method {given!r} is not for --{option}: see `lrc list methods` for what it makes smaller."
            )
    notes = []
    if architecture.head_norms and asked["qk"] in METHODS and isinstance(mixture := METHODS[asked["qk"]], Mixture):
        parts = names["qk"].split(OR)
        linear = [name for name in parts if name == DENSE or not isinstance(METHODS[name], ModuleMethod)]
        if not linear:
            notes.append(
                f"{names['qk']} cannot make queries and keys of {architecture.name!r} narrower (they are normalised "
                f"head by head); {mixture.name} compresses them by {mixture.instead_of_qk} here. Choose with --qk."
            )
        names["qk"] = OR.join(linear) or mixture.instead_of_qk
    chosen = [METHODS[name] for part in names.values() for name in part.split(OR) if name != DENSE]
    if not any(isinstance(method, ModuleMethod) for method in chosen) and recipe.metric is not None:
        raise InputError(
            f"--metric {recipe.metric} concerns module methods ({', '.join(_module_methods())}); no part of the blocks "
            "has one. Choose the metric of a linear method by its name."
        )
    return Scheme(**names, metric=recipe.metric or _metric(recipe, chosen)), tuple(notes)


def rival_of(recipe: Recipe, resolved: Resolved) -> Scheme | None:
    """Return the scheme of the mixture that a recipe's own is held against.

    None where parts have methods of their own, or the architecture does not allow it.
    """
    method = METHODS[recipe.method]
    if not isinstance(method, Mixture) or method.rival is None or resolved.architecture.head_norms:
        return None
    if recipe.attention or recipe.qk or recipe.vo or recipe.mlp or recipe.metric not in (None, method.metric):
        return None
    try:
        unit_members(resolved.heads)
    except InputError:
        return None
    return scheme_of(recipe.model_copy(update={"method": method.rival, "metric": None}), resolved.architecture)[0]


def _part(asked: str, group: Group) -> str:
    """Name of the method or alternatives that `asked` means for one part of a block."""
    if OR in asked:
        found = [_part(name.strip(), group) for name in asked.split(OR)]
        if DENSE in found or [isinstance(METHODS[name], ModuleMethod) for name in found] != [False, True]:
            raise InputError(
                f"The alternatives {asked!r} are not a linear method and a module method for {group.title}, in this "
                "order. Pass for instance 'kfac|nystrom' as --mlp."
            )
        return OR.join(found)
    if asked == DENSE:
        return DENSE
    if asked not in METHODS:
        raise InputError(unknown("method", asked, [*METHODS, DENSE]))
    method = METHODS[asked]
    if isinstance(method, Mixture):
        return getattr(method, group.name)
    return asked if isinstance(method, LinearMethod) or method.group == group else DENSE


def _metric(recipe: Recipe, chosen: list[LinearMethod | ModuleMethod | Mixture]) -> ModuleMetric:
    """The mixture's metric; else the one that has the linear methods' unit, so that losses compare."""
    method = METHODS[recipe.method]
    if isinstance(method, Mixture):
        return method.metric
    linear = [method for method in chosen if isinstance(method, LinearMethod)]
    return "kfac" if linear and all(method.unit == "nats" for method in linear) else "gram"


def _module_methods() -> list[str]:
    return [name for name, method in METHODS.items() if isinstance(method, ModuleMethod)]


def methods_of(scheme: Scheme) -> Mapping[str, tuple[LinearMethod | ModuleMethod, ...]]:
    """Look up the methods of a scheme, module methods in its metric: the alternatives of each part, none if dense.

    Raises
    ------
    InputError
        A name is unknown, or is that of a mixture.
    """
    found: dict[str, tuple[LinearMethod | ModuleMethod, ...]] = {}
    for group in BLOCK_GROUPS:
        names = [name for name in getattr(scheme, group.name).split(OR) if name != DENSE]
        found[group.name] = tuple(_single(METHODS[name], scheme.metric) for name in names)
    return found


def _single(method: LinearMethod | ModuleMethod | Mixture, metric: ModuleMetric) -> LinearMethod | ModuleMethod:
    if isinstance(method, Mixture):
        raise InputError(f"{method.name} is a mixture; a scheme names single methods for each part of a block.")
    return replace(method, fisher=metric == "kfac") if isinstance(method, ModuleMethod) else method


def label(recipe: Recipe) -> str:
    """Name what a recipe does, for reports: the method, and the parts that have their own."""
    parts = [f"{option}: {getattr(recipe, option)}" for option in ("attention", "qk", "vo", "mlp")]
    own = [part for part in parts if not part.endswith(": None")]
    return f"{recipe.method} ({', '.join(own)})" if own else recipe.method
