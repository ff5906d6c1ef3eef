"""From the names of methods that a user gives to the method of each part of a block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from lowrank_compress.arch.spec import HEAD, LATENT, QUERY_KEY, Group
from lowrank_compress.arch.targets import Resolved, Target
from lowrank_compress.config import ModuleMetric, Scheme
from lowrank_compress.errors import InputError
from lowrank_compress.methods.cr import unit_members
from lowrank_compress.methods.experts import ExpertMethod
from lowrank_compress.methods.linear import LinearMethod
from lowrank_compress.methods.mixture import Mixture
from lowrank_compress.methods.module import ModuleMethod
from lowrank_compress.methods.parts import deciding, flag_of, groups_of, own_methods, require_known
from lowrank_compress.methods.refusals import known, refuse_experts, refuse_heads
from lowrank_compress.methods.table import METHODS
from lowrank_compress.recipe import Recipe
from lowrank_compress.registry import unknown

DENSE = "dense"
OR = "|"  # between alternatives: the one that loses less is taken, block by block

Method = LinearMethod | ModuleMethod | ExpertMethod


@dataclass(frozen=True)
class Part:
    """Matrices of a block that have one method.

    Attributes
    ----------
    group
        The group that they are of; all of it, or all of one expert, where they have a module method; all experts where
        they have a method for these as a whole.
    targets
        The matrices.
    methods
        Alternatives for them; none where they stay dense.
    """

    group: Group
    targets: tuple[Target, ...]
    methods: tuple[Method, ...]

    @property
    def label(self) -> str:
        """Its name in ranks.json, behind the path of its block."""
        experts = {target.expert for target in self.targets}
        expert = experts.pop()
        return self.group.label if expert is None or experts else f"{self.group.label}.{expert}"


# What is done where nothing but the cache is made smaller.
NOTHING = Mixture(name=DENSE, methods={}, paper="", help="all stays as it is", allocate="loss", metric="kfac")


def method_of(recipe: Recipe) -> Method | Mixture:
    """Look up the method of a recipe; "dense" is one.

    Raises
    ------
    InputError
        It is unknown.
    """
    return NOTHING if recipe.method == DENSE else METHODS[recipe.method]


def scheme_of(recipe: Recipe, resolved: Resolved) -> tuple[Scheme, tuple[str, ...]]:
    """Decide the method of each part of a block: its own, else that of the attention, else `method`.

    A module method stands for the parts it is for, a mixture for all of its parts; what neither covers stays dense.
    Alternatives (a linear and a module method) stand with a bar between them. Where an architecture forbids to make
    queries and keys narrower, a mixture uses its other alternative, or the linear method that it names for that case.
    The method of a role, or of a pattern over names, is one method, and wins over that of the group.

    Returns
    -------
    tuple
        The scheme, and what a user should know about it.

    Raises
    ------
    InputError
        A part or a method is unknown, a method is not for its part, or a metric is given where there is no module
        method.
    """
    own = own_methods(recipe)
    architecture = resolved.architecture
    if architecture.latent:
        refuse_heads(own | {"": recipe.method}, architecture)
    refuse_experts({**own, "": recipe.method}, architecture)
    require_known(own, resolved)
    covered = {name: groups_of(name, architecture) for name in own}
    asked = {group.name: recipe.method for group in architecture.groups}
    for name in sorted(own, key=lambda name: -len(covered[name])):  # what is said of one group is said last
        asked |= dict.fromkeys(covered[name], own[name])
    asked.setdefault(HEAD.name, DENSE)
    methods = {group.name: _part(asked[group.name], group) for group in (*architecture.groups, HEAD)}
    if methods[HEAD.name] == DENSE and HEAD.name not in own:
        del methods[HEAD.name]
    for name, method in own.items():
        if covered[name] and method != DENSE and all(methods[group] == DENSE for group in covered[name]):
            raise InputError(
                f"The method {method!r} is not for {flag_of(name)}: see `lrc list methods` for what it makes smaller."
            )
    notes = []
    wanted = asked.get(QUERY_KEY.name, DENSE)
    if architecture.head_norms and wanted in METHODS and isinstance(mixture := METHODS[wanted], Mixture):
        parts = methods["qk"].split(OR)
        linear = [name for name in parts if name == DENSE or not isinstance(METHODS[name], ModuleMethod)]
        if not linear:
            notes.append(
                f"{methods['qk']} cannot make queries and keys of {architecture.name!r} narrower (they are normalised "
                f"{architecture.normalised}); {mixture.name} compresses them by {mixture.instead_of_qk} here. Choose "
                "with --qk."
            )
        methods["qk"] = OR.join(linear) or mixture.instead_of_qk
    mixture = known(asked.get(LATENT.name, DENSE))
    if isinstance(mixture, Mixture) and methods[LATENT.name] == mixture.instead_of_qk:
        notes.append(
            f"Heads of {architecture.name!r} are made of a latent vector, and cannot be made narrower; {mixture.name} "
            f"compresses the attention by {mixture.instead_of_qk} here. Choose with --attention."
        )
    methods |= {name: own[name] for name in own if not covered[name]}
    chosen = [method for name in methods.values() for method in _alternatives(name)]
    if not any(isinstance(method, ModuleMethod) for method in chosen) and recipe.metric is not None:
        raise InputError(
            f"--metric {recipe.metric} concerns module methods ({', '.join(_module_methods())}); no part of the blocks "
            "has one. Choose the metric of a linear method by its name."
        )
    window = None if recipe.kv_ratio is None else recipe.kv_window
    scheme = Scheme(methods=methods, metric=recipe.metric or _metric(recipe, chosen), kv_window=window)
    for block in range(len(resolved.blocks) + 1):
        for _ in parts_of(scheme, resolved, block):
            pass  # complains of what cannot be
    return scheme, tuple(notes)


def rival_of(recipe: Recipe, resolved: Resolved) -> Scheme | None:
    """Return the scheme of the mixture that a recipe's own is held against.

    None where parts have methods of their own, the cache keeps latents, or the architecture does not allow it.
    """
    method = method_of(recipe)
    architecture = resolved.architecture
    if not isinstance(method, Mixture) or method.rival is None or architecture.head_norms or architecture.latent:
        return None
    if own_methods(recipe) or recipe.kv_ratio is not None or recipe.metric not in (None, method.metric):
        return None
    try:
        unit_members(resolved.heads)
    except InputError:
        return None
    return scheme_of(recipe.model_copy(update={"method": method.rival, "metric": None}), resolved)[0]


def parts_of(scheme: Scheme, resolved: Resolved, block: int) -> Iterator[Part]:
    """Divide the matrices of a block by method: group by group, in the order of computation.

    Raises
    ------
    InputError
        A name is unknown, or that of a mixture; a module method is for some matrices of a group only, or for another
        group's.
    """
    for group in (*resolved.architecture.groups, HEAD):
        yield from _parts_of_group(scheme, group, [t for t in resolved.of_block(block) if t.group == group.name])


def _parts_of_group(scheme: Scheme, group: Group, together: Sequence[Target]) -> Iterator[Part]:
    if method := _for_all_experts(scheme, group, together):
        yield Part(group, tuple(together), (method,))
        return
    for expert in dict.fromkeys(target.expert for target in together):
        members = [target for target in together if target.expert == expert]
        names = [scheme.methods[key] if (key := deciding(each, scheme.methods)) else DENSE for each in members]
        for name in dict.fromkeys(names):
            own = tuple(target for target, each in zip(members, names, strict=True) if each == name)
            methods = tuple(_single(method, scheme.metric) for method in _alternatives(name))
            for method in methods:
                if isinstance(method, ModuleMethod) and (not _is_for(method, group) or len(own) < len(members)):
                    raise InputError(
                        f"The method {method.name!r} makes {method.group.title} narrower, as a whole; it is not for "
                        f"{' and '.join(target.name for target in own)} alone. Choose a linear method there, or dense."
                    )
            yield Part(group, own, methods)


def _for_all_experts(scheme: Scheme, group: Group, together: Sequence[Target]) -> ExpertMethod | None:
    """Return the method for all experts of a block as a whole, if they have one."""
    keys = (deciding(target, scheme.methods) for target in together)
    names = {scheme.methods[key] if key else DENSE for key in keys}
    for name in sorted(names):
        for method in _alternatives(name):
            if isinstance(method, ExpertMethod):
                if group.name != method.group.name or names != {method.name}:
                    raise InputError(
                        f"The method {method.name!r} is for all experts of a block as a whole, and no alternative to "
                        "others. Give it with --experts, and leave them no other method."
                    )
                return method
    return None


def methods_of(scheme: Scheme) -> Mapping[str, tuple[Method, ...]]:
    """Look up the methods of a scheme, module methods in its metric: the alternatives of each entry, none if dense.

    Raises
    ------
    InputError
        A name is unknown, or is that of a mixture.
    """
    return {
        key: tuple(_single(method, scheme.metric) for method in _alternatives(name))
        for key, name in scheme.methods.items()
    }


def label(recipe: Recipe) -> str:
    """Name what a recipe does, for reports: the method, and the parts that have their own."""
    parts = [f"{name}: {method}" for name, method in own_methods(recipe).items()]
    parts += [] if recipe.kv_ratio is None else ["cache: latent"]
    return f"{recipe.method} ({', '.join(parts)})" if parts else recipe.method


def _part(asked: str, group: Group) -> str:
    """Name of the method or alternatives that `asked` means for one part of a block."""
    if OR in asked:
        found = [_part(name.strip(), group) for name in asked.split(OR)]
        kinds = [type(known(name)) for name in found]
        if kinds != [LinearMethod, ModuleMethod]:
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
        return _of_mixture(method, group)
    return asked if isinstance(method, LinearMethod) or _is_for(method, group) else DENSE


def _is_for(method: ModuleMethod | ExpertMethod, group: Group) -> bool:
    return method.group.name == (group.kind if isinstance(method, ModuleMethod) else group.name)


def _of_mixture(mixture: Mixture, group: Group) -> str:
    """Name of a mixture's method for a group; of latent attention, the linear one that it has for queries and keys."""
    if group.name in mixture.methods or group != LATENT:
        return mixture.methods.get(group.name, mixture.methods.get(group.kind, DENSE))
    names = mixture.methods.get(QUERY_KEY.name, DENSE).split(OR)
    linear = [name for name in names if name == DENSE or not isinstance(METHODS[name], ModuleMethod)]
    return (linear or [mixture.instead_of_qk])[0]


def _alternatives(name: str) -> list[Method | Mixture]:
    if unheard := [each for each in name.split(OR) if each != DENSE and each not in METHODS]:
        raise InputError(unknown("method", unheard[0], [*METHODS, DENSE]))
    return [METHODS[each] for each in name.split(OR) if each != DENSE]


def _metric(recipe: Recipe, chosen: Sequence[Method | Mixture]) -> ModuleMetric:
    """The mixture's metric; else the one that has the linear methods' unit, so that losses compare."""
    method = method_of(recipe)
    if isinstance(method, Mixture):
        return method.metric
    linear = [method for method in chosen if isinstance(method, LinearMethod)]
    return "kfac" if linear and all(method.unit == "nats" for method in linear) else "gram"


def _module_methods() -> list[str]:
    return [name for name, method in METHODS.items() if isinstance(method, ModuleMethod)]


def _single(method: Method | Mixture, metric: ModuleMetric) -> Method:
    if isinstance(method, Mixture):
        raise InputError(
            f"{method.name} is a mixture: methods for the parts of a block. Single matrices, and alternatives, have "
            "single methods; see `lrc list methods`."
        )
    return replace(method, fisher=metric == "kfac") if isinstance(method, ModuleMethod) else method
