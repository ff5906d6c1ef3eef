"""What an attention does beyond the usual, as its family's architecture declares it."""

from __future__ import annotations

from typing import Any, NamedTuple


class Traits(NamedTuple):
    """What the attention of a family does beyond projections, rotation, softmax and output.

    All but two name an attribute of the attention module (those of tokens and bounds may be an attribute's attribute,
    with a dot); the empty name says that there is nothing of the kind.

    Parameters
    ----------
    query_norm, key_norm
        Modules that normalise queries and keys, over each head by itself.
    whole_norms
        Whether they normalise all heads of a token together instead, before these are parted.
    rotates
        Whether this layer rotates queries and keys; where there is no such attribute, all layers do that are given
        rotary tables.
    window
        Tokens that a sliding window holds; None for a layer without one.
    soft_cap
        Bound of the scores, for the attention function; None for no bound.
    dropout
        Probability with which attention weights are dropped in training, or a module that has it.
    output_dropout
        Module that drops outputs.
    reordered
        Whether eager attention is computed by the module's own ``_upcast_and_reordered_attn`` (GPT-2).
    sinks
        A further score of each query head, (heads,), that takes a share of attention which goes nowhere.
    halved_tables
        Whether rotary tables have one column for each pair of dimensions that turns, and not one for each dimension.
    """

    query_norm: str = ""
    key_norm: str = ""
    whole_norms: bool = False
    rotates: str = ""
    window: str = ""
    soft_cap: str = ""
    dropout: str = "attention_dropout"
    output_dropout: str = ""
    reordered: str = ""
    sinks: str = ""
    halved_tables: bool = False

    def entry(self) -> dict[str, Any]:
        """Return what is not as usual: so much of it stands in a checkpoint's config."""
        return {name: value for name, value in self._asdict().items() if value != self._field_defaults[name]}


def traits_problem(entry: Any) -> str:
    """Say why a config's entry is not one of traits, or nothing."""
    if not isinstance(entry, dict):
        return f"expected traits by name, got {entry!r}"
    usual = Traits()._asdict()
    if unknown := sorted(set(entry) - set(usual)):
        return f"unknown traits {', '.join(unknown)}, expected some of {', '.join(usual)}"
    wrong = [name for name, value in entry.items() if type(value) is not type(usual[name])]
    wrong += [name for name in ("query_norm", "key_norm") if bool(entry.get(name)) != bool(entry.get("query_norm"))]
    return f"its trait {wrong[0]} cannot be {entry.get(wrong[0])!r}" if wrong else ""
