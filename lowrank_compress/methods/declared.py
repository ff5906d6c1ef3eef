"""Options that what a recipe uses declares: its allocator and its methods, of this package or of another."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lowrank_compress.allocation.table import ALLOCATORS
from lowrank_compress.config import Scheme
from lowrank_compress.errors import InputError
from lowrank_compress.methods.mixture import Mixture
from lowrank_compress.methods.scheme import method_of, methods_of
from lowrank_compress.methods.table import METHODS
from lowrank_compress.options import Option, settle
from lowrank_compress.recipe import Recipe


def options_of(*schemes: Scheme) -> tuple[Option, ...]:
    """List the options that the methods of schemes declare, each once."""
    methods = (method for scheme in schemes for ways in methods_of(scheme).values() for method in ways)
    return tuple(dict.fromkeys(option for method in methods for option in method.options))


def options_used(recipe: Recipe, allocate: str, scheme: Scheme, rival: Scheme | None) -> dict[str, Any]:
    """Decide the options of all that a recipe uses, by name; those of what it does not use are not among them.

    Parameters
    ----------
    allocate
        Name of the allocator.
    scheme, rival
        What is done, and what plans are held against, whose mixture has an allocator of its own.

    Raises
    ------
    InputError
        An option is given that nothing declares, or a value that it does not take.
    """
    allocators, schemes = [allocate], [scheme]
    method = method_of(recipe)
    if rival is not None and isinstance(method, Mixture) and method.rival is not None:
        allocators.append(METHODS[method.rival].allocate)
        schemes.append(rival)
    declared = (*(option for name in allocators for option in ALLOCATORS[name].options), *options_of(*schemes))
    if mine := [option for option in declared if option.name in recipe.options and option.name in Recipe.model_fields]:
        raise InputError(f"The option {mine[0].name} is one of every recipe: pass {flag(mine[0])}VALUE.")
    own = {option.name: getattr(recipe, option.name) for option in declared if option.name in Recipe.model_fields}
    names = sorted({name for part in scheme.methods.values() for name in part.split("|") if name in METHODS})
    return settle(_distinct(declared), own | recipe.options, f"the allocator {allocate} and of {' and '.join(names)}")


def flag(option: Option) -> str:
    """What stands before the option's value on the command line."""
    own = option.name in Recipe.model_fields
    return f"--{option.name.replace('_', '-')} " if own else f"--option {option.name}="


def _distinct(declared: Iterable[Option]) -> list[Option]:
    """Each option once.

    Raises
    ------
    InputError
        Two plug-ins mean different things by one name.
    """
    found: dict[str, Option] = {}
    for option in declared:
        if found.setdefault(option.name, option) != option:
            raise InputError(
                f"Two of the allocator and methods declare an option {option.name!r}, and not the same one. Use one of "
                "them at a time."
            )
    return list(found.values())
