"""Names in memory and on disk: the one file that knows both.

They may differ: a checkpoint of the base model lacks a prefix, GPT-NeoX stores its head under another name, old BERTs
have `gamma` and `beta`, and experts that lie in one parameter are stored one by one. transformers' own conversion rules
say what is what; nothing else in this package sees a name on disk.

Experts that are separate in memory have one stored tensor for each of their matrices, under the stock name in a stock
checkpoint, under their own in a compressed one; or, in a stock one, these are pieces of tensors that have all of them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from lowrank_compress.errors import CheckpointError
from lowrank_compress.shipped.experts import SeparateExperts
from lowrank_compress.shipped.fusion import FUSED, ROLES, Fusion


@dataclass(frozen=True, eq=False)
class Piece:
    """A matrix or a bias of one expert in a stored tensor that has those of all experts of a block.

    Attributes
    ----------
    number
        Which expert.
    leaf
        Name of the piece below it.
    fusion
        How the tensor holds pieces.
    whole
        The tensor in the stock model, on the meta device.
    """

    number: int
    leaf: str
    fusion: Fusion
    whole: Tensor

    def of(self, own: Tensor) -> Tensor:
        """Take it out of what the stored tensor has of its expert; it shares no memory with that."""
        found = self.fusion.views({self.fusion.source(self.leaf): own[None]})[self.leaf][0]
        return found.clone(memory_format=torch.contiguous_format)


@dataclass(frozen=True)
class Names:
    """Where a model's tensors are stored.

    Attributes
    ----------
    stored
        Tensor name in the model -> name on disk. Tied tensors appear once, under the name of the one that the others
        are tied to, whichever of them is stored. Several are in one, if they are in `pieces`.
    converted
        Tensor name in the model -> names on disk of the several tensors that it is made of, in natural order.
    ties
        Further names on disk of tensors that are tied: name on disk -> that of the one they are tied to.
    unknown
        Name on disk of a tensor that the model does not have -> the name that it would have there.
    pieces
        Tensor name in the model -> which piece of the stored one it is, where it is not all of it.
    """

    stored: dict[str, str]
    converted: dict[str, tuple[str, ...]]
    ties: dict[str, str]
    unknown: dict[str, str]
    pieces: dict[str, Piece] = field(default_factory=dict)


def names_of(path: Path, on_disk: Collection[str], model: PreTrainedModel) -> Names:
    """Map the names of stored tensors to those of a model.

    Parameters
    ----------
    path
        Of the checkpoint, for messages.
    on_disk
        Names of all tensors that it stores.

    Raises
    ------
    CheckpointError
        A tensor is stored twice.
    """
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    state = model.state_dict()
    experts = experts_of(model)
    known = state | {f"{path}.{leaf}": True for path, several in experts.items() for leaf in several.fusion.names}
    found: dict[str, str] = {}
    pieces: dict[str, Piece] = {}
    parts: dict[str, list[str]] = {}
    unknown: dict[str, str] = {}
    # In the order in which transformers goes through them: some rules take effect from the first match on.
    for stored in sorted(on_disk, key=dot_natural_key):
        # Of packed experts' matrices: the rules are about their weights.
        whole, leaf = _weight_of(stored) if experts else (stored, "")
        name, pattern = rename_source_key(whole, renamings, converters, model.base_model_prefix, known)
        if whole != stored and (name in state or name not in known or pattern is None):
            name, pattern = rename_source_key(stored, renamings, converters, model.base_model_prefix, known)
        if name not in state and name in known:
            if pattern is None:
                own = dict(_pieces(name, experts))
                pieces |= own
                found |= dict.fromkeys(own, stored)
                continue
            name, pattern = _of_expert(stored, name, pattern, converters).removesuffix("weight") + leaf, None
        if name not in state and stored in state:
            name, pattern = rename_source_key(stored, [], [], model.base_model_prefix, state)
        if name not in state:
            unknown[stored] = name
        elif pattern is not None:
            parts.setdefault(name, []).append(stored)
        elif name in found:
            raise CheckpointError(
                f"{path} stores the tensor {name} twice, as {found[name]} and as {stored}. Which one counts is not "
                "said: remove one."
            )
        else:
            found[name] = stored
    ties: dict[str, str] = {}
    for name, source in model.all_tied_weights_keys.items():
        if name in found and source in found:
            ties[found.pop(name)] = found[source]
        elif name in found:
            found[source] = found.pop(name)
    return Names(found, {name: tuple(several) for name, several in parts.items()}, ties, unknown, pieces)


def experts_of(model: torch.nn.Module) -> dict[str, SeparateExperts]:
    """Return the separate experts of a model by their paths."""
    return {path: module for path, module in model.named_modules() if isinstance(module, SeparateExperts)}


def _weight_of(stored: str) -> tuple[str, str]:
    """Return the name of the weight that a stored tensor is, or is a part of, and the leaf of its own."""
    path, _, leaf = stored.rpartition(".")
    return (f"{path}.weight", leaf) if leaf.startswith("weight_") else (stored, leaf)


def _of_expert(stored: str, fused: str, pattern: str, converters: Sequence[WeightConverter]) -> str:
    """Return the name of a stored expert's matrix in memory, where that of all experts would be joined to `fused`."""
    path, _, leaf = fused.rpartition(".")
    together = next(list(rule.source_patterns) for rule in converters if pattern in rule.source_patterns)
    role = ROLES[together.index(pattern)] if leaf == FUSED[0] else ROLES[-1]
    (number,) = re.findall(r"\.experts\.(\d+)\.", stored)
    return f"{path}.{number}.{role}.weight"


def _pieces(name: str, experts: Mapping[str, SeparateExperts]) -> Iterator[tuple[str, Piece]]:
    """Name what there is of experts in a stock tensor that has all of a block, by its name in a stock model."""
    path, _, whole = name.rpartition(".")
    fusion, stock = experts[path].fusion, experts[path].__dict__["stock"]
    for number in range(len(experts[path])):
        for leaf in fusion.leaves:
            if fusion.source(leaf) == whole:
                yield f"{path}.{number}.{leaf}", Piece(number, leaf, fusion, stock.get_parameter(whole))


def in_memory(model: PreTrainedModel, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings of `LowRankConfig` with the names that packed matrices of stock experts have in a model."""
    packed = settings.get("factor_quantization")
    if not packed or "linears" not in packed or not experts_of(model):
        return dict(settings)
    names = {
        stored.removesuffix(".weight"): name.removesuffix(".weight") for name, stored in stock_names(model).items()
    }
    linears = {names.get(path, path): entry for path, entry in packed["linears"].items()}
    return {**settings, "factor_quantization": {**packed, "linears": linears}}


def stock_names(model: PreTrainedModel) -> Mapping[str, str]:
    """Return, for each tensor of separate experts by its name, the name under which stock checkpoints store it.

    transformers is asked to save tensors that tell by their values which ones these are; several may be in one.
    """
    tokens, names = {}, []
    for path, experts in experts_of(model).items():
        parts = {}
        for leaf in experts.fusion.leaves:
            shape = (-1, 1, 1) if leaf.endswith("weight") else (-1, 1)
            parts[leaf] = torch.arange(len(names), len(names) + len(experts)).view(shape)
            names += [f"{path}.{number}.{leaf}" for number in range(len(experts))]
        tokens |= {f"{path}.{name}": experts.fusion.joined(name, parts) for name in experts.fusion.names}
    found = revert_weight_conversion(model, tokens) if tokens else {}
    return {names[value]: stored for stored, values in found.items() for value in values.flatten().tolist()}
