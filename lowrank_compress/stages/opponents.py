"""Two checkpoints that are held against each other: what they are, and whether that can be done."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lowrank_compress.calibration.tokens import bos_of
from lowrank_compress.calibration.windows import batches_hash
from lowrank_compress.config import CompareConfig
from lowrank_compress.errors import InputError
from lowrank_compress.model.blueprint import Blueprint
from lowrank_compress.model.checkpoint import Checkpoint
from lowrank_compress.model.locate import locate
from lowrank_compress.model.tasks import NEED_EXAMPLES
from lowrank_compress.model.walk.batch import Batch
from lowrank_compress.stages.run import Run


def checkpoint_at(target: str, trust: bool) -> Checkpoint:
    """Find the checkpoint of a run, or any other."""
    run = Run(Path(target))
    return Checkpoint(run.finished().path if run.exists() else locate(target, None, trust), trust)


def require_one_kind(targets: Sequence[str], plans: Sequence[Blueprint]) -> None:
    """Refuse models whose states or predictions cannot be held against each other."""
    facts = {
        "are of different families": [plan.model.config.model_type for plan in plans],
        "have different heads": [plan.task for plan in plans],
        "have different numbers of blocks": [len(plan.resolved.blocks) for plan in plans],
        "have hidden states of different widths": [plan.model.config.hidden_size for plan in plans],
        "have vocabularies of different sizes": [plan.model.config.vocab_size for plan in plans],
        "have different classes": [plan.checkpoint.class_ids if plan.task in NEED_EXAMPLES else 0 for plan in plans],
    }
    for what, (one, other) in facts.items():
        if one != other:
            raise InputError(
                f"{targets[0]} and {targets[1]} {what}: {one} and {other}. Expected two versions of one model; `lrc "
                "eval` measures any model by itself."
            )


def require_use(plan: Blueprint, config: CompareConfig, prompts: Sequence[str]) -> None:
    """Refuse data that the heads of the models are not for."""
    name = type(plan.model).__name__
    told = ("lm", "masked") if config.perplexity and not (config.tasks or prompts) else ("lm",)
    if plan.task not in told and (config.perplexity or config.tasks or prompts):
        instead = {"masked": "--perplexity alone", "embedding": "--sts"}.get(plan.task, "--classification")
        raise InputError(
            "--tasks and --prompt need causal language models, and --perplexity needs these or masked ones; of a "
            f"{name} use {instead}."
        )
    if plan.task != "embedding" and config.sts:
        instead = "--classification" if plan.task in NEED_EXAMPLES else "--perplexity"
        raise InputError(f"--sts compares embeddings, and a {name} has a head; use {instead}.")
    if plan.task not in NEED_EXAMPLES and config.classification is not None:
        instead = "--sts" if plan.task == "embedding" else "--perplexity"
        raise InputError(f"--classification needs a head that labels are for, and a {name} has none; use {instead}.")
    longest = plan.longest_input()
    if (config.seq_len or 0) > longest:
        raise InputError(f"--seq-len {config.seq_len} is more than the models' {longest} positions.")


def require_one_tokenizer(targets: Sequence[str], tokenizers: Sequence[Any]) -> None:
    """Refuse tokenizers that give the same text other tokens."""
    one, other = (tokenizer.get_vocab() for tokenizer in tokenizers)
    if one != other:
        first = next(token for token in [*one, *other] if one.get(token) != other.get(token))
        raise InputError(
            f"{targets[0]} and {targets[1]} have different tokenizers: the token {first!r} has the numbers "
            f"{one.get(first)} and {other.get(first)}. Their losses are of different tokens; measure each by "
            "itself with `lrc eval`."
        )


def require_same_windows(targets: Sequence[str], tokenizers: Sequence[Any], made: Sequence[list[Batch]]) -> None:
    """Refuse tokenizers that make other windows of one text."""
    if batches_hash(made[0]) != batches_hash(made[1]):
        begins = [bos_of(tokenizer) for tokenizer in tokenizers]
        how = f"windows begin with {begins[0]} and {begins[1]}" if begins[0] != begins[1] else "it is split otherwise"
        raise InputError(
            f"{targets[0]} and {targets[1]} have different tokenizers: they make other windows of the same text "
            f"({how}). Their losses are of different tokens; measure each by itself with `lrc eval`."
        )
