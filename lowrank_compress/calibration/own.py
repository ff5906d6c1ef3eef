"""Text that a language model writes by itself: a calibration set for which no data are needed.

What a model was trained on is often not to be had, and what it is calibrated on in its place draws it to that domain.
Text sampled from the model itself lies where the model's own predictions are; LLM-QAT (Liu et al., Findings of ACL
2024, section 3.1) trains quantized models on such. Tokens are drawn at temperature 1 from all of the vocabulary.

A window begins with the bos token, where the tokenizer puts one before a text. Where it does not: with what the chat
template puts before a user's words, after which an instructed model writes a question and then its answer (Magpie, Xu
et al., ICLR 2025); without a template, with the token that parts documents. An end of a text does not end a window:
the model goes on behind it, as it was trained to.

Batches are finished one by one and kept in the user's cache, by content: they are used again, and after an interruption
only those are made that are missing. Each has a seed of its own and a fixed number of windows, so that nothing depends
on how many are asked for.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedTokenizerBase

from lowrank_compress.artifacts.documents import canonical_hash
from lowrank_compress.artifacts.hashes import cache_directory
from lowrank_compress.artifacts.tensors import BlockFiles
from lowrank_compress.calibration.tokens import bos_of, encode, require_known, vocabulary_of
from lowrank_compress.errors import InputError, NumericsError
from lowrank_compress.model.blueprint import blueprint
from lowrank_compress.model.checkpoint import Checkpoint
from lowrank_compress.model.tasks import AUTO
from lowrank_compress.resources.memory import free_memory

VERSION = 2
STEP = "write text"
# Windows that are sampled side by side: at most so many, of no more tokens, or bytes of keys and values.
ROWS, TOKENS, CACHED_BYTES = 32, 16384, 1 << 31
_WORDS = "\N{SNOWMAN}words of a user\N{SNOWMAN}"


def start_of(tokenizer: PreTrainedTokenizerBase, checkpoint: Checkpoint) -> list[int]:
    """Tokens that every window begins with.

    Raises
    ------
    InputError
        There is nothing to begin with, or it is no token of the model's.
    """
    vocabulary = vocabulary_of(checkpoint)
    if (bos := bos_of(tokenizer, vocabulary)) is not None:
        return [bos]
    if tokenizer.chat_template:
        chat = [{"role": "user", "content": _WORDS}]
        before, words, _ = str(tokenizer.apply_chat_template(chat, tokenize=False)).partition(_WORDS)
        if words and (ids := encode(tokenizer, before, vocabulary).tolist()):
            return ids
    config = checkpoint.config.get_text_config()
    for found in (config.bos_token_id, tokenizer.bos_token_id, config.eos_token_id, tokenizer.eos_token_id):
        one = found[0] if isinstance(found, list) and found else found
        if isinstance(one, int):
            require_known(tokenizer, torch.tensor([one]), vocabulary)
            return [one]
    raise InputError(
        f"{checkpoint.path} has no bos or eos token and no chat template that a text of its own could begin with. Name "
        "a text with --calibration."
    )


def own_windows(
    checkpoint: Checkpoint,
    tokenizer: PreTrainedTokenizerBase,
    id: str,
    *,
    seq_len: int,
    first: int,
    count: int,
    seed: int,
    device: str,
    memory: int | None = None,
    advance: Callable[[str, int, int], None] = lambda step, done, total: None,
) -> Tensor:
    """Windows number `first` and on of the text that a model writes, (count, seq_len) int64.

    Parameters
    ----------
    checkpoint, tokenizer
        The dense model. All of it is in memory meanwhile, in float32.
    id
        What the checkpoint is by content.
    memory
        Bytes to get by with; None for what is free.
    advance
        Called with (step, tokens done, tokens in all), where any are made.

    Raises
    ------
    InputError
        The model does not fit in memory, or there is nothing to begin with.
    NumericsError
        A prediction is not finite.
    """
    start, rows = start_of(tokenizer, checkpoint), rows_of(checkpoint, seq_len)
    if len(start) >= seq_len:
        raise InputError(
            f"A text of the model's own begins with the {len(start)} tokens of its chat template; --seq-len {seq_len} "
            "leaves no room behind them. Use a longer one."
        )
    said = {"model": id, "seq_len": seq_len, "seed": seed, "device": device, "start": start, "version": VERSION}
    cache, key = cache_directory(), canonical_hash(said)
    files = None if cache is None else BlockFiles(cache / "own", key, "text")
    numbers = range(first // rows, -(-(first + count) // rows))
    missing = [number for number in numbers if files is None or not files.finished(number)]
    made: dict[int, Tensor] = {}
    if missing:
        _require_room(checkpoint, seq_len, torch.device(device), memory)
        total, done = len(missing) * (seq_len - len(start)), 0
        model = _loaded(checkpoint, device)
        for number in missing:
            digest = hashlib.sha256(f"{seed} {number}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
            ids = begun = torch.tensor(start).repeat(rows, 1)
            for longer in sampled(model, begun, seq_len, generator):
                ids, done = longer, done + 1
                advance(STEP, done, total)
            made[number] = ids
            _keep(files, number, ids)
    parts = [made[number] if number in made or files is None else files.read(number)["ids"] for number in numbers]
    return torch.cat(parts)[first - numbers.start * rows :][:count].long()


@torch.no_grad()
def sampled(model: Any, ids: Tensor, length: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Draw one token after another from a model's predictions, until there are `length`.

    Parameters
    ----------
    ids
        What all begin with, (rows, tokens) int64.

    Yields
    ------
    Tensor
        All tokens so far, (rows, tokens) int64.
    """
    parameters = inspect.signature(model.forward).parameters
    name = "cache" if "cache" in parameters else "past_key_values"
    given: dict[str, Any] = {name: DynamicCache(config=model.config), "use_cache": True}
    given |= {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
    new = ids
    while ids.shape[1] < length:
        logits = model(new.to(model.device), **given).logits[:, -1].float()
        if not torch.isfinite(logits).all():
            raise NumericsError("The model gave NaN or infinite logits on a text of its own. Check the checkpoint.")
        new = torch.multinomial(logits.softmax(-1).cpu(), 1, generator=generator)
        ids = torch.cat([ids, new], 1)
        yield ids


def _loaded(checkpoint: Checkpoint, device: str) -> Any:
    model: Any = AUTO["lm"].from_pretrained(
        checkpoint.path, dtype=torch.float32, trust_remote_code=checkpoint.trust_remote_code
    )
    return model.to(device).eval().requires_grad_(False)


def rows_of(checkpoint: Checkpoint, seq_len: int) -> int:
    """How many windows of a text are sampled side by side; depends on nothing but the model and their length."""
    return max(1, min(ROWS, max(TOKENS, CACHED_BYTES // _cached_bytes(checkpoint)) // seq_len))


def bytes_to_write(checkpoint: Checkpoint, seq_len: int) -> int:
    """Bytes that a model and its cache take while it writes."""
    weights = 4 * sum(parameter.numel() for parameter in blueprint(checkpoint).model.parameters())
    return weights + rows_of(checkpoint, seq_len) * seq_len * _cached_bytes(checkpoint)


def _cached_bytes(checkpoint: Checkpoint) -> int:
    """Bytes of keys and values of one token, in float32."""
    config = checkpoint.config.get_text_config()
    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    return 8 * len(blueprint(checkpoint).resolved.blocks) * config.hidden_size * groups // heads


def _require_room(checkpoint: Checkpoint, seq_len: int, device: torch.device, memory: int | None) -> None:
    """Refuse a model that does not fit beside its cache of keys and values."""
    takes, has = bytes_to_write(checkpoint, seq_len), free_memory() if memory is None else memory
    if device.type == "cuda":
        has = torch.cuda.mem_get_info(device)[0]
    if takes > has:
        raise InputError(
            f"--calibration self has the whole model in memory, {takes / 1e9:.1f} GB with its cache, and "
            f"there are {has / 1e9:.1f} GB. Name a text, which needs one block at a time; or give it more memory."
        )


def _keep(files: BlockFiles | None, number: int, ids: Tensor) -> None:
    """Keep a batch for the next time, where that can be."""
    if files is None:
        return
    with contextlib.suppress(OSError):
        files.directory.mkdir(parents=True, exist_ok=True)
        files.write(number, {"ids": ids.to(torch.int32)})
