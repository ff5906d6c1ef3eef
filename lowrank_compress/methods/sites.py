"""The parts of a model's blocks that a scheme compresses, and for each the ways to do it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lowrank_compress.arch.spec import QUERY_KEY
from lowrank_compress.arch.targets import Resolved, Target
from lowrank_compress.config import Scheme
from lowrank_compress.errors import UnsupportedError
from lowrank_compress.methods.linear import LinearMethod
from lowrank_compress.methods.matrix_unit import MatrixUnit
from lowrank_compress.methods.module import ModuleMethod
from lowrank_compress.methods.module_unit import ModuleUnit
from lowrank_compress.methods.scheme import DENSE, Part, parts_of
from lowrank_compress.methods.units import Unit, dense_elements


@dataclass(frozen=True)
class Site:
    """A part of a block, and the ways to compress it.

    Attributes
    ----------
    alternatives
        The units of each way; each way has the same matrices.
    """

    alternatives: tuple[tuple[Unit, ...], ...]

    @property
    def dense(self) -> int:
        """Elements of all its dense matrices."""
        return sum(dense_elements(unit) for unit in self.alternatives[0])


def sites_of(resolved: Resolved, scheme: Scheme) -> tuple[Site, ...]:
    """List what a scheme compresses in a model, block by block in the order of computation.

    Raises
    ------
    UnsupportedError
        Queries and keys that are normalised head by head are to be made narrower.
    InputError
        A method is unknown.
    """
    sites: list[Site] = []
    for block, path in enumerate((*resolved.blocks, "")):
        for part in parts_of(scheme, resolved, block):
            if part.methods:
                name = f"{path}:{part.group.label}"
                if block == len(resolved.blocks):
                    _require_no_data(part)
                sites.append(Site(tuple(_units(method, name, part.targets, resolved) for method in part.methods)))
    return tuple(sites)


def _require_no_data(part: Part) -> None:
    """Refuse methods outside the blocks that take statistics, which are taken inside of them."""
    for method in part.methods:
        if not isinstance(method, LinearMethod) or any(method.statistics(target) for target in part.targets):
            raise UnsupportedError(
                f"The method {method.name} needs statistics, which are taken inside the blocks only; it is not for "
                f"{part.group.title}. Give it a method without, for instance --for {part.group.name}=svd."
            )


def _units(
    method: LinearMethod | ModuleMethod, name: str, targets: tuple[Target, ...], resolved: Resolved
) -> tuple[Unit, ...]:
    if isinstance(method, LinearMethod):
        return tuple(MatrixUnit(target, method) for target in targets)
    if method.group == QUERY_KEY and resolved.architecture.head_norms:
        raise UnsupportedError(
            f"{method.name} cannot make queries and keys of {resolved.architecture.name!r} narrower: they are "
            "normalised head by head, over all dimensions of a head. Give them a linear method, for instance --qk "
            f"kfac, or leave them with --qk {DENSE}."
        )
    return (ModuleUnit(name, targets, method),)


def all_units(sites: Sequence[Site]) -> tuple[Unit, ...]:
    """Return the units of all alternatives."""
    return tuple(unit for site in sites for way in site.alternatives for unit in way)


def first_units(sites: Sequence[Site]) -> tuple[Unit, ...]:
    """Return the units of each site's first alternative."""
    return tuple(unit for site in sites for unit in site.alternatives[0])
