"""How a model without a head makes one vector of a text: what sentence-transformers runs behind it, read of its files.

Reimers and Gurevych (EMNLP 2019) pool the last hidden states: their mean over the tokens, the first one's, their
maximum; most models then scale the result to length 1. A checkpoint that says nothing of it is taken for one whose mean
is compared by its direction, which is what is usually done with such.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowrank_compress.artifacts.documents import parse_json
from lowrank_compress.artifacts.files import read_small_text
from lowrank_compress.errors import CheckpointError, UnsupportedError
from lowrank_compress.model.checkpoint import Checkpoint
from lowrank_compress.model.shards import read_settings

MODULES = "modules.json"
# sentence_bert_config.json, under all the names that it has.
_LENGTHS = "sentence_*_config.json"


def _mean(hidden: Tensor, mask: Tensor) -> Tensor:
    return (hidden * mask).sum(1) / mask.sum(1)


def _mean_of_root(hidden: Tensor, mask: Tensor) -> Tensor:
    return (hidden * mask).sum(1) / mask.sum(1).sqrt()


def _first(hidden: Tensor, mask: Tensor) -> Tensor:
    return hidden[torch.arange(len(hidden)), mask.squeeze(-1).argmax(1)]


def _last(hidden: Tensor, mask: Tensor) -> Tensor:
    positions = torch.arange(hidden.shape[1], device=hidden.device)
    return hidden[torch.arange(len(hidden)), (mask.squeeze(-1) * positions).argmax(1)]


def _largest(hidden: Tensor, mask: Tensor) -> Tensor:
    return hidden.masked_fill(mask == 0, float("-inf")).amax(1)


POOLINGS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean": _mean,
    "cls": _first,
    "max": _largest,
    "mean_sqrt_len_tokens": _mean_of_root,
    "lasttoken": _last,
}
"""(hidden states (texts, length, width), mask (texts, length, 1)) -> (texts, width); sentence-transformers' names."""
_FLAGS = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_lasttoken": "lasttoken",
}


@dataclass(frozen=True)
class Embedding:
    """What makes a vector of the last hidden states.

    Attributes
    ----------
    modes
        Names in `POOLINGS`; the vectors of several stand one after the other.
    normalised
        Whether the result is scaled to length 1.
    longest
        Tokens of a text, special ones included, that are read; None for all that the model has positions for.
    """

    modes: tuple[str, ...] = ("mean",)
    normalised: bool = True
    longest: int | None = None

    def of(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        """Make the embeddings of texts.

        Parameters
        ----------
        hidden
            Last hidden states, (texts, length, width).
        mask
            (texts, length), 1 for real tokens; None where nothing is padded.

        Returns
        -------
        Tensor
            (texts, width), or wider where there are several poolings.
        """
        whole = torch.ones_like(hidden[..., :1]) if mask is None else mask[..., None].to(hidden)
        found = torch.cat([POOLINGS[mode](hidden, whole) for mode in self.modes], -1)
        return torch.nn.functional.normalize(found, dim=-1) if self.normalised else found


def embedding_of(checkpoint: Checkpoint) -> Embedding:
    """Read how a checkpoint's hidden states become an embedding.

    Raises
    ------
    UnsupportedError
        There is more behind the model than a pooling and a normalisation, or a pooling that is not known.
    CheckpointError
        A file that modules.json names is not there, or is not what it should be.
    """
    path = checkpoint.path
    if not (path / MODULES).exists():
        return Embedding()
    modes, normalised = ("mean",), False
    for number, module in enumerate(_modules(checkpoint)):
        kind = str(module.get("type", "")).rpartition(".")[2]
        if kind == "Pooling":
            modes = _modes(checkpoint, str(module.get("path", "")))
        elif kind == "Normalize":
            normalised = True
        elif number > 0 or kind != "Transformer":
            raise UnsupportedError(
                f"{path / MODULES} has a {kind or 'nameless'} module behind the model; embeddings are known that are "
                "pooled and normalised. Methods without gradients, such as --method svd-llm, need no embedding."
            )
    return Embedding(modes, normalised or not _told_by_length(checkpoint), longest_of(checkpoint))


def longest_of(checkpoint: Checkpoint) -> int | None:
    """Read how many tokens of a text sentence-transformers would have read; None where it does not say."""
    lengths = [read_settings(each).get("max_seq_length") for each in sorted(checkpoint.path.glob(_LENGTHS))]
    return min((length for length in lengths if isinstance(length, int) and length > 0), default=None)


def _modules(checkpoint: Checkpoint) -> list[Mapping[str, Any]]:
    path = checkpoint.path / MODULES
    try:
        found = parse_json(read_small_text(path), unique=False)
    except ValueError as problem:
        raise CheckpointError(f"{path} is not JSON ({problem}). Download the checkpoint again.") from problem
    if not isinstance(found, list) or not all(isinstance(module, Mapping) for module in found):
        raise CheckpointError(f"{path} holds no list of modules. Download the checkpoint again.")
    return found


def _modes(checkpoint: Checkpoint, directory: str) -> tuple[str, ...]:
    """Read which poolings there are."""
    path = checkpoint.path / directory / "config.json"
    if not path.resolve().is_relative_to(checkpoint.path.resolve()):
        raise CheckpointError(f"{checkpoint.path / MODULES} names {directory!r}; expected a directory inside.")
    settings = read_settings(path)
    named = settings.get("pooling_mode")
    found = [named] if isinstance(named, str) else list(named or ())
    found += [
        _FLAGS.get(name, name) for name, on in settings.items() if name.startswith("pooling_mode_") and on is True
    ]
    found = list(dict.fromkeys(found))
    if not found or not POOLINGS.keys() >= set(found):
        raise UnsupportedError(
            f"{path} says {', '.join(map(str, found)) or 'no pooling'}; known are {', '.join(POOLINGS)}. Methods "
            "without gradients, such as --method svd-llm, need no embedding."
        )
    return tuple(mode for mode in POOLINGS if mode in found)


def _told_by_length(checkpoint: Checkpoint) -> bool:
    """Whether the embedding's length counts where it is compared."""
    path = checkpoint.path / "config_sentence_transformers.json"
    said = read_settings(path).get("similarity_fn_name") if path.exists() else None
    return said not in (None, "cosine")
