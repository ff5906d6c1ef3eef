"""The parts of a model that a scheme compresses, and for each the candidates: target groups that it may become."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lowrank_compress.arch.spec import QUERY_KEY
from lowrank_compress.arch.targets import Resolved, Target
from lowrank_compress.config import Scheme
from lowrank_compress.errors import UnsupportedError
from lowrank_compress.methods.expert_group import ExpertGroup
from lowrank_compress.methods.experts import ExpertMethod
from lowrank_compress.methods.groups import TargetGroup, dense_elements
from lowrank_compress.methods.latent import LABEL, LatentGroup
from lowrank_compress.methods.linear import LinearMethod
from lowrank_compress.methods.matrix_group import MatrixGroup
from lowrank_compress.methods.merge_group import MergeGroup
from lowrank_compress.methods.module import ModuleMethod
from lowrank_compress.methods.module_group import ModuleGroup
from lowrank_compress.methods.scheme import DENSE, Method, Part, parts_of


@dataclass(frozen=True)
class Candidates:
    """What a part of a block may be compressed as.

    Attributes
    ----------
    each
        The target groups of each candidate; all have the same matrices.
    cache
        Whether it is what a cache keeps, which has a budget of its own.
    """

    each: tuple[tuple[TargetGroup, ...], ...]
    cache: bool = False

    @property
    def dense(self) -> int:
        """Elements of all its dense matrices."""
        return sum(dense_elements(group) for group in self.each[0])


def candidates_of(resolved: Resolved, scheme: Scheme) -> tuple[Candidates, ...]:
    """List what a scheme compresses in a model, block by block in the order of computation.

    Where keys and values are rebuilt from a latent, and nothing of them is kept besides, they are in no other group.

    Raises
    ------
    UnsupportedError
        Queries and keys that are normalised are to be made narrower, or heads whose cache keeps a latent.
    InputError
        A method is unknown.
    """
    found: list[Candidates] = []
    for block, path in enumerate((*resolved.blocks, "")):
        for part in parts_of(scheme, resolved, block):
            part = _without_rebuilt(part, scheme)
            if part.methods and part.targets:
                name = f"{path}:{part.label}"
                if block == len(resolved.blocks):
                    _require_no_data(part)
                found.append(Candidates(tuple(_groups(each, name, part.targets, resolved) for each in part.methods)))
        if scheme.kv_window is not None and block < len(resolved.blocks):
            found.append(Candidates(((key_value_group(resolved, block, scheme.kv_window),),), cache=True))
    return tuple(found)


def key_value_group(resolved: Resolved, block: int, window: int) -> LatentGroup:
    """Return the group of what a block may cache."""
    key, value = (target for role in "kv" for target in resolved.of_block(block) if target.role == role)
    return LatentGroup(f"{resolved.blocks[block]}:{LABEL}", (key, value), window)


def _without_rebuilt(part: Part, scheme: Scheme) -> Part:
    """Leave out keys and values that a latent stands for."""
    if scheme.kv_window is None:
        return part
    for method in part.methods:
        if isinstance(method, ModuleMethod) and any(target.heads is not None for target in part.targets):
            raise UnsupportedError(
                f"{method.name} makes the heads of {part.group.title} narrower, and --kv-ratio rebuilds keys and "
                "values of whole heads from a latent. Leave --kv-ratio out, and make the cache of the result smaller "
                "by `lrc cache`; or give the attention a linear method, for instance --attention kfac."
            )
    if scheme.kv_window:
        return part
    return replace(part, targets=tuple(target for target in part.targets if target.role not in ("k", "v")))


def _require_no_data(part: Part) -> None:
    """Refuse methods outside the blocks that take statistics, which are taken inside of them."""
    for method in part.methods:
        if not isinstance(method, LinearMethod) or any(method.statistics(target) for target in part.targets):
            raise UnsupportedError(
                f"The method {method.name} needs statistics, which are taken inside the blocks only; it is not for "
                f"{part.group.title}. Give it a method without, for instance --for {part.group.name}=svd."
            )


def _groups(method: Method, name: str, targets: tuple[Target, ...], resolved: Resolved) -> tuple[TargetGroup, ...]:
    if isinstance(method, LinearMethod):
        return tuple(MatrixGroup(target, method) for target in targets)
    if isinstance(method, ExpertMethod):
        return (_experts(method, name, targets, resolved),)
    if method.group == QUERY_KEY and resolved.architecture.head_norms:
        raise UnsupportedError(
            f"{method.name} cannot make queries and keys of {resolved.architecture.name!r} narrower: they are "
            f"normalised {resolved.architecture.normalised}, over all their dimensions. Give them a linear method, for "
            f"instance --qk kfac, or leave them with --qk {DENSE}."
        )
    return (ModuleGroup(name, targets, method),)


def _experts(method: ExpertMethod, name: str, targets: tuple[Target, ...], resolved: Resolved) -> ExpertGroup:
    router = resolved.router
    if router is None or (method.whole and router.fixed):
        raise UnsupportedError(
            f"{method.name} cannot take experts from {resolved.architecture.name!r}, because its router cannot do with "
            f"fewer: {'it is not known' if router is None else router.fixed}. Make experts smaller instead, for "
            "instance with --experts camera, nystrom or kfac."
        )
    if method.merges:
        return MergeGroup(name, targets, method, targets[0].module.rsplit(".", 2)[0], router)
    return ExpertGroup(name, targets, method, f"{resolved.blocks[targets[0].block]}.{router.path}", router)


def all_groups(candidates: Sequence[Candidates]) -> tuple[TargetGroup, ...]:
    """Return the groups of all candidates."""
    return tuple(group for part in candidates for each in part.each for group in each)


def yardsticks(candidates: Sequence[Candidates]) -> dict[str, tuple[TargetGroup, ...]]:
    """Return the groups of the first alternative for each group that is one of several, by its name.

    Where losses are no nats a token, those of alternatives are shares of the mean total of these: a unit of their own,
    in which they compare, and in which the first alternative counts as much as it would alone.
    """
    return {
        group.name: part.each[0] for part in candidates if len(part.each) > 1 for each in part.each for group in each
    }


def first_groups(candidates: Sequence[Candidates]) -> tuple[TargetGroup, ...]:
    """Return the groups of each part's first candidate."""
    return tuple(group for part in candidates for group in part.each[0])
