"""Names in memory and on disk: the one file that knows both.

They may differ: a checkpoint of the base model lacks a prefix, GPT-NeoX stores its head under another name, old BERTs
have `gamma` and `beta`, and experts that lie in one parameter are stored one by one. transformers' own conversion rules
say what is what; nothing else in this package sees a name on disk.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from lowrank_compress.errors import CheckpointError


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
    found: dict[str, str] = {}
    parts: dict[str, list[str]] = {}
    unknown: dict[str, str] = {}
    # In the order in which transformers goes through them: some rules take effect from the first match on.
    for stored in sorted(on_disk, key=dot_natural_key):
        name, pattern = rename_source_key(stored, renamings, converters, model.base_model_prefix, state)
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
