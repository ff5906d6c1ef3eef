"""Text to tokens, without special ones: deterministic, in parts, within the vocabulary."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lowrank_compress.calibration.cells import Chat, Render
from lowrank_compress.errors import InputError
from lowrank_compress.model.checkpoint import Checkpoint, in_a_line
from lowrank_compress.model.shards import COMPANIONS, require_small


def load_tokenizer(path: Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load a checkpoint's tokenizer.

    Raises
    ------
    InputError
        The checkpoint has none.
    CheckpointError
        A file of it is no regular one, or far too large.
    """
    for name in COMPANIONS:
        if (path / name).exists():
            require_small(path / name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        tokenizer("a", verbose=False)  # some settings are of use, and fail, only then
        return tokenizer
    except Exception as problem:  # transformers raises many types here
        raise InputError(
            f"{path} has no tokenizer that transformers can load ({in_a_line(problem)}). Put "
            "tokenizer.json and tokenizer_config.json beside the weights."
        ) from problem


def vocabulary_of(checkpoint: Checkpoint) -> int | None:
    """Rows of a checkpoint's embedding, as its config says."""
    return getattr(checkpoint.config.get_text_config(), "vocab_size", None)


def bos_of(tokenizer: PreTrainedTokenizerBase, vocabulary: int | None = None) -> int | None:
    """The bos token that the tokenizer puts before a text, if it does.

    Parameters
    ----------
    vocabulary
        Rows of the model's embedding, which its id must have one of.

    Raises
    ------
    InputError
        It has none.
    """
    with_special = tokenizer("a", add_special_tokens=True)["input_ids"]
    bos = tokenizer.bos_token_id
    if bos is None or not with_special or with_special[0] != bos:  # pyright: ignore
        return None
    require_known(tokenizer, torch.tensor([bos]), vocabulary)
    return bos  # pyright: ignore


def renderer(tokenizer: PreTrainedTokenizerBase) -> Render | None:
    """Return what makes a text of a conversation by the tokenizer's chat template; None where it has none.

    A bos token at the beginning is left out where windows bring their own.
    """
    if not tokenizer.chat_template:
        return None
    bos = tokenizer.bos_token if bos_of(tokenizer) is not None else None

    def render(chat: Chat) -> str:
        text = str(tokenizer.apply_chat_template(chat, tokenize=False))
        return text.removeprefix(bos) if isinstance(bos, str) else text

    return render


# Characters that are tokenised at once, and those around them.
PART, CONTEXT = 1 << 18, 1 << 10


def encode(
    tokenizer: PreTrainedTokenizerBase,
    text: str | Iterable[str],
    vocabulary: int | None = None,
    *,
    most: int | None = None,
    part: int = PART,
    context: int = CONTEXT,
) -> Tensor:
    """Token ids of a text, (tokens,) int32, without special tokens.

    A tokenizer takes some 200 bytes a character. A long text is therefore tokenised in parts of `part` characters, each
    with `context` characters around it, and cut where a token begins: tokens depend on their surroundings only, so that
    they are those of the whole text. (Not so where a run that no tokenizer splits, such as digits, is longer than
    `context`; what counts then are the parts.)

    Parameters
    ----------
    text
        The text, whole or in pieces of any length.
    vocabulary
        Rows of the model's embedding, which every id must have one of.
    most
        Read no further once there are so many tokens; None for all.
    part, context
        Characters at once, and around them.

    Raises
    ------
    InputError
        An id is beyond the vocabulary.
    """
    found, count = [np.zeros(0, np.int32)], 0
    for ids in _in_parts(tokenizer, iter((text,)) if isinstance(text, str) else iter(text), part, context):
        found.append(ids)
        count += len(ids)
        if most is not None and count >= most:
            break
    whole = torch.from_numpy(np.concatenate(found))
    require_known(tokenizer, whole, vocabulary)
    return whole


def require_known(tokenizer: PreTrainedTokenizerBase, ids: Tensor, vocabulary: int | None) -> None:
    """Make sure that the model has an embedding for every token id.

    Parameters
    ----------
    vocabulary
        Rows of the model's embedding; None if that is not known.

    Raises
    ------
    InputError
        An id is beyond them.
    """
    if vocabulary is not None and ids.numel() and (worst := int(ids.max())) >= vocabulary:
        raise InputError(
            f"The tokenizer makes the token {tokenizer.convert_ids_to_tokens(worst)!r} with id {worst}, but the model "
            f"has embeddings for ids below {vocabulary} only. The tokenizer belongs to another model."
        )


def _in_parts(
    tokenizer: PreTrainedTokenizerBase, pieces: Iterator[str], part: int, context: int
) -> Iterator[np.ndarray]:
    """Tokenise a text that comes in pieces; arrays of int32 ids, one after the other those of the text."""
    if not tokenizer.is_fast:  # it does not say where its tokens are
        yield _narrow(tokenizer("".join(pieces), add_special_tokens=False, verbose=False)["input_ids"])
        return
    before, rest = "", ""
    for piece in (each[start : start + part] for each in pieces for start in range(0, len(each), part)):
        rest += piece
        while len(rest) > part + context:
            ids, starts = _tokens(tokenizer, before + rest[: part + context])
            cut = int(starts[starts <= len(before) + part].max(initial=0))
            taken = cut - len(before)
            if taken > 0:
                yield ids[(starts >= len(before)) & (starts < cut)]
                before, rest = (before + rest[:taken])[-context:], rest[taken:]
            else:  # one token of more than `part` characters, as of an unknown word, becomes several; or there is none
                yield _tokens(tokenizer, rest[:part])[0]
                before, rest = "", rest[part:]
    ids, starts = _tokens(tokenizer, before + rest)
    yield ids[starts >= len(before)]


def _narrow(ids: Any) -> np.ndarray:
    """Return ids as int32; those that do not fit are beyond every vocabulary, and stay so."""
    return np.minimum(np.array(ids, np.int64), np.iinfo(np.int32).max).astype(np.int32)


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[np.ndarray, np.ndarray]:
    """Return ids, int32, and where each token begins; a token of no characters begins where the one after it does."""
    found = tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=True)
    spans = np.array(found["offset_mapping"], np.int64).reshape(-1, 2)
    return _narrow(found["input_ids"]), np.maximum.accumulate(spans[:, 0])
