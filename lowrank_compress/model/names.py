"""Names in memory and on disk: the one file that knows both.

They may differ: a checkpoint of the base model lacks a prefix, GPT-NeoX stores its head under another name, old BERTs
have `gamma` and `beta`, and experts that lie in one parameter are stored one by one. transformers' own conversion rules
say what is what; nothing else in this package sees a name on disk.

Experts that are separate in memory have one stored tensor for each of their matrices: under the stock name in a stock
checkpoint, under their own in a compressed one.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
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
from lowrank_compress.shipped.experts import FUSED, ROLES, SeparateExperts


@dataclass(frozen=True)
class Names:
    """Where a model's tensors are stored.

    Attributes
    ----------
    stored
        Tensor name in the model -> name on disk. Tied tensors appear once, under the name of the one that the others
        are tied to, whichever of them is stored.
    converted
        Tensor name in the model -> names on disk of the several tensors that it is made of, in natural order.
    ties
        Further names on disk of tensors that are tied: name on disk -> that of the one they are tied to.
    unknown
        Name on disk of a tensor that the model does not have -> the name that it would have there.
    """

    stored: dict[str, str]
    converted: dict[str, tuple[str, ...]]
    ties: dict[str, str]
    unknown: dict[str, str]


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
    known = state | {f"{path}.{leaf}": True for path in experts for leaf in FUSED}
    found: dict[str, str] = {}
    parts: dict[str, list[str]] = {}
    unknown: dict[str, str] = {}
    # In the order in which transformers goes through them: some rules take effect from the first match on.
    for stored in sorted(on_disk, key=dot_natural_key):
        name, pattern = rename_source_key(stored, renamings, converters, model.base_model_prefix, known)
        if name not in state and name.rpartition(".")[0] in experts:
            if pattern is None:
                raise CheckpointError(
                    f"{path} stores the experts of a block in one tensor, {stored}; expected one for each matrix of "
                    "each expert. Load it with transformers and `save_pretrained` it, which parts them."
                )
            name, pattern = _of_expert(stored, name, pattern, converters), None
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
    return Names(found, {name: tuple(several) for name, several in parts.items()}, ties, unknown)


def experts_of(model: torch.nn.Module) -> dict[str, SeparateExperts]:
    """Return the separate experts of a model by their paths."""
    return {path: module for path, module in model.named_modules() if isinstance(module, SeparateExperts)}


def _of_expert(stored: str, fused: str, pattern: str, converters: Sequence[WeightConverter]) -> str:
    """Return the name of a stored expert's matrix in memory, where that of all experts would be joined to `fused`."""
    path, _, leaf = fused.rpartition(".")
    together = next(list(rule.source_patterns) for rule in converters if pattern in rule.source_patterns)
    role = ROLES[together.index(pattern)] if leaf == FUSED[0] else ROLES[-1]
    (number,) = re.findall(r"\.experts\.(\d+)\.", stored)
    return f"{path}.{number}.{role}.weight"


def stock_names(model: PreTrainedModel) -> Mapping[str, str]:
    """Return, for each matrix of separate experts by its name, the name under which stock checkpoints store it.

    transformers is asked to save tensors that tell by their values which matrices these are.
    """
    tokens, names = {}, []
    for path, experts in experts_of(model).items():
        own = [[f"{path}.{number}.{role}.weight" for role in ROLES] for number in range(len(experts))]
        first = torch.arange(len(names), len(names) + 3 * len(own)).view(-1, 3, 1)
        tokens |= {f"{path}.{FUSED[0]}": first[:, :2].clone(), f"{path}.{FUSED[1]}": first[:, 2:].clone()}
        names += [name for several in own for name in several]
    found = revert_weight_conversion(model, tokens) if tokens else {}
    return {names[int(value)]: stored for stored, value in found.items()}
