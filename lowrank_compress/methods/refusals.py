"""Methods that an architecture has no place for."""

from __future__ import annotations

from collections.abc import Mapping

from lowrank_compress.arch.spec import EXPERTS, QUERY_KEY, VALUE_OUTPUT, Architecture
from lowrank_compress.errors import UnsupportedError
from lowrank_compress.methods.experts import ExpertMethod
from lowrank_compress.methods.linear import LinearMethod
from lowrank_compress.methods.mixture import Mixture
from lowrank_compress.methods.module import ModuleMethod
from lowrank_compress.methods.parts import flag_of
from lowrank_compress.methods.table import METHODS


def known(name: str) -> LinearMethod | ModuleMethod | ExpertMethod | Mixture | None:
    """Look up a method; None for what is none, which is complained of elsewhere."""
    return METHODS[name] if name in METHODS else None  # noqa: SIM401  (the registry's complains)


def refuse_heads(asked: Mapping[str, str], architecture: Architecture) -> None:
    """Refuse what would make heads narrower where these are made of a latent vector."""
    for part, name in asked.items():
        method = known(name)
        of_heads = isinstance(method, ModuleMethod) and method.group in (QUERY_KEY, VALUE_OUTPUT)
        if of_heads or part in (QUERY_KEY.name, VALUE_OUTPUT.name):
            what = (
                f"The method {name!r} makes heads narrower, and" if of_heads else f"There is no {flag_of(part)} here:"
            )
            raise UnsupportedError(
                f"{what} those of {architecture.name!r} are made of a latent vector. Give its attention a linear "
                "method, for instance --attention kfac, which compresses the projections to it and from it."
            )


def refuse_experts(asked: Mapping[str, str], architecture: Architecture) -> None:
    """Refuse a method for experts where there are none."""
    for name in asked.values():
        if isinstance(known(name), ExpertMethod) and EXPERTS not in architecture.groups:
            raise UnsupportedError(
                f"The method {name!r} is for routed experts, and models of architecture {architecture.name!r} have "
                "none. Choose another; see `lrc list methods`."
            )
