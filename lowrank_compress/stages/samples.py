"""The calibration set of a config, what is held out of it, and whether it is enough."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from lowrank_compress.artifacts.documents import canonical_hash
from lowrank_compress.calibration.capture import Advance
from lowrank_compress.calibration.own import bytes_to_write, own_windows, start_of
from lowrank_compress.calibration.shares import shares
from lowrank_compress.calibration.sources import PAPERS_DATA, Source
from lowrank_compress.calibration.statistics import ENOUGH
from lowrank_compress.calibration.tokens import load_tokenizer, vocabulary_of
from lowrank_compress.calibration.windows import drawn_windows, window_batches
from lowrank_compress.config import CalibrationSet
from lowrank_compress.errors import InputError, LrcError
from lowrank_compress.methods.groups import TargetGroup
from lowrank_compress.model.blueprint import Blueprint
from lowrank_compress.model.checkpoint import Checkpoint
from lowrank_compress.model.tasks import Task
from lowrank_compress.model.walk.batch import Batch
from lowrank_compress.resources.memory import all_memory
from lowrank_compress.stages.identity import checkpoint_id, source_id
from lowrank_compress.stages.reading import source_batches
from lowrank_compress.texts import SELF, TextPart

Usual = str | tuple[TextPart, ...]


def usual_text(design: Blueprint, seq_len: int, samples: int, device: str) -> tuple[Usual, tuple[str, ...]]:
    """Name what is calibrated on where nothing is named: WikiText-2, and as much that the model writes itself.

    The latter is left out where the model writes no text, or would take more than half of the memory that there is.
    Calibrated on WikiText-2 alone a model loses more in every other domain, its own above all (docs/calibration.md).

    Returns
    -------
    tuple
        The text, and why a language model writes none of it, if so.
    """
    checkpoint = design.checkpoint
    if design.task != "lm" or samples < 2:
        return PAPERS_DATA, ()
    takes, has = bytes_to_write(checkpoint, seq_len), all_memory(torch.device(device))
    try:
        begun = start_of(load_tokenizer(checkpoint.path, checkpoint.trust_remote_code), checkpoint)
    except LrcError:
        why = "it has nothing to begin a text with"
    else:
        if len(begun) < seq_len and takes <= has // 2:
            return (TextPart(text=PAPERS_DATA), TextPart(text=SELF)), ()
        why = f"it would take {takes / 1e9:.1f} of {has / 1e9:.1f} GB of memory, more than half"
        if len(begun) >= seq_len:
            why = f"its chat template takes all of --seq-len {seq_len}"
    return PAPERS_DATA, (
        f"No text is named, and the model writes none, as {why}: it is calibrated on WikiText-2 alone. Text of what "
        "the model is for is better: name it with --calibration.",
    )


def parts_of(config: CalibrationSet) -> tuple[TextPart, ...]:
    """Name the texts of a config, and what is said of each.

    Raises
    ------
    InputError
        It names none.
    """
    if config.source is None:
        raise InputError("The method needs calibration data; name a text with --calibration.")
    return (TextPart(text=config.source),) if isinstance(config.source, str) else config.source


def sources_of(config: CalibrationSet) -> list[Source]:
    """Name the texts of a config, each with its columns; those that are named for all are the tables'.

    Raises
    ------
    InputError
        It names none.
    """
    parts = parts_of(config)
    tables = [part for part in parts if Source(part.text).is_table]
    return [
        Source(
            part.text,
            part.text_column or (config.text_column if part in tables or not tables else None),
            part.label_column or (config.label_column if part in tables or not tables else None),
        )
        for part in parts
    ]


def text_id(config: CalibrationSet) -> str:
    """Identify the content of the text of a config, or of all its texts.

    Raises
    ------
    CalibrationError
        One does not exist, or cannot be read.
    """
    found = [source_id(source) for source in sources_of(config)]
    return found[0] if isinstance(config.source, str) else canonical_hash(found)


def settings_of(config: CalibrationSet, *without: str) -> dict[str, Any]:
    """Return what a key holds of a config: all but where texts are; of several texts, how they are mixed."""
    found = config.model_dump(mode="json", exclude={"source", *without})
    if not isinstance(config.source, str | None):
        said = [part.model_dump(mode="json") for part in config.source]
        found["mixture"] = [{name: each[name] for name in each if name != "text"} for each in said]
    return found


def has_own(config: CalibrationSet) -> bool:
    """Whether a text of a config is what the dense model writes by itself."""
    return any(source.is_own for source in sources_of(config))


def check_own(config: CalibrationSet, task: Task) -> None:
    """Refuse text of the model's own where the model writes none.

    Raises
    ------
    InputError
        So it is.
    """
    if task != "lm" and has_own(config):
        raise InputError(
            "--calibration self samples text from a language model, and this model writes none. Name a text, or a "
            "table of examples."
        )


def check_shares(config: CalibrationSet) -> None:
    """Refuse a mixture of which a text would have no window.

    Raises
    ------
    InputError
        So it is.
    """
    parts = parts_of(config)
    found = shares([part.weight for part in parts], config.samples)
    if 0 in found:
        raise InputError(
            f"Of --samples {config.samples} none would be of {parts[found.index(0)].text}: the share of its weight is "
            "too small. Ask for more samples, or leave it out."
        )


# Of text that plans are tried on: windows, tokens in all of them, and in large models no more of these, down to FEWEST,
# than come to so many products with the model's elements.
TRIED_WINDOWS, TRIED_TOKENS, TRIED_PRODUCTS, FEWEST = 16, 8192, 1 << 40, 2048
# Passages are shorter than windows, and each has one embedding.
TRIED_PASSAGES = 64


def few_tokens(checkpoint: Checkpoint) -> int:
    """How many tokens a model is run on where one number is to be found for all of it."""
    elements = sum(math.prod(stored.shape) for stored in checkpoint.tensors.values())
    return min(TRIED_TOKENS, max(FEWEST, TRIED_PRODUCTS // elements))


def held_out_batches(config: CalibrationSet, checkpoint: Checkpoint, task: Task) -> list[Batch]:
    """Make a set like the calibration set of what follows it after the shuffle: some windows, or examples.

    A text that is spent by the calibration set has none left; then it is the first of that set.
    """
    count = max(1, min(TRIED_WINDOWS, few_tokens(checkpoint) // config.seq_len))
    few = config.model_copy(update={"samples": TRIED_PASSAGES if task == "embedding" else count})
    return calibration_batches(few, checkpoint, task, skip=config.samples) or calibration_batches(few, checkpoint, task)


def _silent(step: str, done: int, total: int) -> None:
    pass


def calibration_batches(config: CalibrationSet, checkpoint: Checkpoint, task: Task, *, skip: int = 0) -> list[Batch]:
    """Make the calibration set of a config: windows of text, or examples for a classifier and an embedding model.

    Of the shuffled ones the first `skip` are left out; there may be none after them. Of several texts each gives its
    share, of what is left out too, in their order.

    Raises
    ------
    CalibrationError, InputError
        The data are missing, empty, too short or have no such column.
    """
    return [batch for part in batches_by_text(config, checkpoint, task, skip=skip) for batch in part]


def batches_by_text(
    config: CalibrationSet,
    checkpoint: Checkpoint,
    task: Task,
    *,
    skip: int = 0,
    memory: int | None = None,
    advance: Advance = _silent,
) -> list[list[Batch]]:
    """Make the calibration set of a config, as `calibration_batches`; the batches of each text by themselves.

    Parameters
    ----------
    memory, advance
        Bytes to get by with, and who is told of progress, where the model writes a text itself.
    """
    check_own(config, task)
    tokenizer = load_tokenizer(checkpoint.path, checkpoint.trust_remote_code)
    weights = [part.weight for part in parts_of(config)]
    counts = zip(sources_of(config), shares(weights, config.samples), shares(weights, skip), strict=True)
    found: list[list[Batch]] = []
    for source, samples, before in counts:
        own = config.model_copy(update={"samples": samples})
        if samples and source.is_own:
            windows = own_windows(
                checkpoint,
                tokenizer,
                checkpoint_id(checkpoint),
                seq_len=config.seq_len,
                first=before,
                count=samples,
                seed=config.seed,
                device=str(getattr(config, "device", "cpu")),
                memory=memory,
                advance=advance,
            )
            found.append(window_batches(list(windows), config.micro_batch))
            continue
        found.append(source_batches(own, source, tokenizer, checkpoint, task, before) if samples else [])
    return found


def with_drawn(batches: Sequence[Batch], each: int, checkpoint: Checkpoint, task: Task) -> list[Batch]:
    """Add windows of random tokens to those of a language model's text (`windows.drawn_windows`)."""
    vocabulary = vocabulary_of(checkpoint)
    if task != "lm" or vocabulary is None:
        return list(batches)
    return [*batches, *drawn_windows(batches, vocabulary, each)]


def too_short(config: CalibrationSet, by_text: Sequence[Sequence[Batch]]) -> list[str]:
    """Say which texts have fewer windows, or examples, than they are to give."""
    parts, found = parts_of(config), []
    for part, asked, own in zip(parts, shares([p.weight for p in parts], config.samples), by_text, strict=True):
        count = sum(len(batch.ids) >> batch.paired for batch in own)
        labels, ids = own[0].labels, own[0].ids
        what = "windows" if labels is None else "sequences" if labels.shape == ids.shape else "examples"
        if count < asked:
            which = "The calibration text" if len(parts) == 1 else part.text
            found.append(
                f"{which} has {count} {what}, fewer than the {asked} asked for; all are taken. Pass more text, a "
                "smaller --seq-len, or a smaller --samples."
            )
    return found


def too_few(groups: Sequence[TargetGroup], batches: Sequence[Batch], gradient: bool) -> str | None:
    """Say what is under-determined by a calibration set, what that may cost, and what would be enough; None if nothing.

    What gradients of losses against labels say is counted by those, of which each has one loss.
    """
    examples = gradient and batches[0].labels is not None
    seen = sum(batch.terms if examples else batch.tokens for batch in batches)
    widest = max(groups, key=lambda group: min(group.shape))
    largest = min(widest.shape)
    if seen >= largest:
        return None
    windows = sum(len(batch.ids) for batch in batches)
    more = -(-ENOUGH * largest * windows // seen)
    return (
        f"The calibration set has {seen} {'examples' if examples else 'tokens'} for the {largest} dimensions of "
        f"{widest.name}: its moments are rank-deficient, and say nothing of most directions. Quality will vary with "
        "the sample and be worse on other text, the more the larger the ratio: perplexities of up to ten times those "
        f"from enough text were measured. Enough is {ENOUGH} for each dimension, here --samples {more}."
    )
