"""Two models beside each other: on texts, on tasks, and in what they write."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from lowrank_compress.calibration.examples import example_batches
from lowrank_compress.calibration.sources import Source, read_examples
from lowrank_compress.calibration.tokens import load_tokenizer, vocabulary_of
from lowrank_compress.config import CompareConfig
from lowrank_compress.errors import InputError
from lowrank_compress.evaluation.contrast import Contrast, contrast
from lowrank_compress.evaluation.findings import SIDES, Draws, of_examples, of_pairs, of_tasks, of_text
from lowrank_compress.evaluation.generation import continued
from lowrank_compress.evaluation.harness import Answers, run_tasks
from lowrank_compress.model.blueprint import Blueprint, blueprint
from lowrank_compress.model.checkpoint import Checkpoint
from lowrank_compress.model.embedding import longest_of
from lowrank_compress.model.skeleton import Skeleton
from lowrank_compress.model.walk.batch import Batch
from lowrank_compress.resources.workers import started
from lowrank_compress.stages.contamination import refuse_calibration_text
from lowrank_compress.stages.environment import compute_device
from lowrank_compress.stages.opponents import (
    checkpoint_at,
    require_one_kind,
    require_one_tokenizer,
    require_same_windows,
    require_use,
)
from lowrank_compress.stages.reading import text_batches
from lowrank_compress.stages.reporting import Reporter, Silent
from lowrank_compress.stages.similarity import Pairs, read_pairs
from lowrank_compress.strict import stage_config
from lowrank_compress.texts import Place, names_of


def compare(
    a: Place,
    b: Place,
    *,
    perplexity: Place | Sequence[Place] = (),
    classification: Place | None = None,
    sts: Place | Sequence[Place] = (),
    tasks: str | Sequence[str] = (),
    prompts: str | Sequence[str] = (),
    device: str = "auto",
    force: bool = False,
    reporter: Reporter | None = None,
    **fields: Any,
) -> dict[str, Any]:
    """Hold model B against model A, as ``lrc compare`` does.

    Parameters
    ----------
    a, b
        Run directories, checkpoint directories or names on the Hugging Face hub, of one family and tokenizer.
    perplexity
        One or more texts.
    classification
        A table of labelled examples, for classifiers.
    sts
        Tables of pairs of texts and how similar they are, for embedding models.
    tasks
        Names of lm-eval tasks.
    prompts
        Texts that both are to continue.
    device
        "auto", "cpu", "cuda" or "cuda:N".
    force
        Measure on the text that a run was calibrated on, too; the result will flatter.
    reporter
        Told about progress and warnings; None for silence, and Python warnings.
    fields
        Any other field of `config.CompareConfig`, such as ``seq_len``, ``limit`` or ``new_tokens``.

    Returns
    -------
    dict
        ``texts``, ``classification`` and ``sts``, by name; ``tasks``, by name and metric; ``generations``, a prompt
        each: see ``lrc compare --json``.

    Raises
    ------
    LrcError
        The input is not what it must be; the message says what to do.
    """
    config = stage_config(
        CompareConfig,
        "The call of compare",
        {
            "perplexity": names_of(perplexity),
            "classification": None if classification is None else str(classification),
            "sts": names_of(sts),
            "tasks": names_of(tasks),
            "device": str(compute_device(device)),
            **fields,
        },
    )
    return run((str(a), str(b)), config, names_of(prompts), force=force, reporter=reporter)


def run(
    targets: tuple[str, str],
    config: CompareConfig,
    prompts: Sequence[str] = (),
    *,
    force: bool = False,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Compare as a config says; see :func:`compare`.

    Raises
    ------
    LrcError
        There is nothing to compare on, or the models are not of one kind.
    """
    reporter = reporter or Silent()
    if not (config.perplexity or config.classification or config.sts or config.tasks or prompts):
        raise InputError(
            "There is nothing to compare on. Pass --perplexity TEXT (for classifiers --classification TABLE, for "
            "embedding models --sts PAIRS), --tasks NAMES or --prompt TEXT."
        )
    if started() > 1:
        raise InputError("lrc compare works in one process; start it without torchrun.")
    for target in targets:
        if not force:
            refuse_calibration_text(Path(target), config)
    checkpoints = [checkpoint_at(target, config.trust_remote_code) for target in targets]
    plans = [blueprint(checkpoint) for checkpoint in checkpoints]
    for warning in dict.fromkeys(warning for plan in plans for warning in plan.warnings):
        reporter.warn(warning)
    require_one_kind(targets, plans)
    require_use(plans[0], config, prompts)
    tokenizers = [load_tokenizer(checkpoint.path, checkpoint.trust_remote_code) for checkpoint in checkpoints]
    require_one_tokenizer(targets, tokenizers)
    found: dict[str, Any] = {
        **dict(zip(SIDES, targets, strict=True)),
        "texts": {},
        "classification": {},
        "sts": {},
        "tasks": {},
        "generations": [],
    }
    draws = Draws(config.seed, config.resamples, config.confidence)

    def contrasted(name: str, batches: Sequence[Batch]) -> Contrast:
        one, other = (Skeleton(each, torch.device(config.device), torch.float32) for each in checkpoints)
        return contrast(one, other, batches, partial(reporter.advance, Path(name).name))

    for name, batches, kind in _data(targets, config, checkpoints, tokenizers):
        made = contrasted(name, batches)
        found[kind][name] = of_text(made, draws) if kind == "texts" else of_examples(made, draws)
    for name, pairs, batches in _pairs(targets, config, plans, tokenizers):
        made = contrasted(name, batches)
        found["sts"][name] = of_pairs(made, pairs.firsts, pairs.seconds, pairs.scores, draws)
    if config.tasks or prompts:
        _whole(found, config, prompts, checkpoints, tokenizers, reporter)
    return found


def _data(
    targets: Sequence[str], config: CompareConfig, checkpoints: Sequence[Checkpoint], tokenizers: Sequence[Any]
) -> Iterator[tuple[str, list[Batch], str]]:
    """Yield the name, the batches and the kind of each text or table."""
    vocabulary = vocabulary_of(checkpoints[0])
    seq_len = config.seq_len or min(2048, blueprint(checkpoints[0]).longest_input())
    for name in config.perplexity:
        source = Source(name, config.text_column)
        made = [text_batches(config, tokenizer, source, seq_len, vocabulary) for tokenizer in tokenizers]
        require_same_windows(targets, tokenizers, made)
        yield name, made[0], "texts"
    if config.classification is not None:
        source = Source(config.classification, config.text_column, config.label_column)
        examples, classes = read_examples(source, config.limit), checkpoints[0].class_ids
        made = [
            example_batches(tokenizer, examples, classes, seq_len, config.batch_size, vocabulary)
            for tokenizer in tokenizers
        ]
        require_same_windows(targets, tokenizers, made)
        yield config.classification, made[0], "classification"


def _pairs(
    targets: Sequence[str], config: CompareConfig, plans: Sequence[Blueprint], tokenizers: Sequence[Any]
) -> Iterator[tuple[str, Pairs, list[Batch]]]:
    """Yield the name of each table of pairs, the pairs and the batches of their texts."""
    lengths = [config.seq_len, *(longest_of(plan.checkpoint) for plan in plans), plans[0].longest_input()]
    for name in config.sts:
        pairs = read_pairs(name, config.text_column, config.label_column, config.limit)
        made = [
            pairs.batches(plan.checkpoint, tokenizer, lengths, config.batch_size)
            for plan, tokenizer in zip(plans, tokenizers, strict=True)
        ]
        require_same_windows(targets, tokenizers, made)
        yield name, pairs, made[0]


def _whole(
    found: dict[str, Any],
    config: CompareConfig,
    prompts: Sequence[str],
    checkpoints: Sequence[Checkpoint],
    tokenizers: Sequence[Any],
    reporter: Reporter,
) -> None:
    """Have one model after the other, whole in memory, do tasks and continue prompts."""
    answers: list[Answers] = []
    written: list[list[list[int]]] = []
    for side, checkpoint, tokenizer in zip(SIDES, checkpoints, tokenizers, strict=True):
        model: Any = AutoModelForCausalLM.from_pretrained(
            checkpoint.path, dtype=checkpoint.dtype, trust_remote_code=checkpoint.trust_remote_code
        )
        model = model.to(config.device).eval()
        if config.tasks:
            reporter.advance(f"tasks ({side.upper()})", 0, 1)
            answers.append(_answers(model, tokenizer, config))
            reporter.advance(f"tasks ({side.upper()})", 1, 1)
        advance = partial(reporter.advance, f"prompts ({side.upper()})")
        written.append(
            continued(model, tokenizer, prompts, config.new_tokens, chat=config.apply_chat_template, advance=advance)
        )
        del model  # one at a time
    if config.tasks:
        found["tasks"] = of_tasks(answers)
    found["generations"] = [
        _generation(tokenizers, prompt, *pair) for prompt, *pair in zip(prompts, *written, strict=True)
    ]


def _answers(model: PreTrainedModel, tokenizer: Any, config: CompareConfig) -> Answers:
    return run_tasks(
        model,
        tokenizer,
        config.tasks,
        include_path=None if config.include_path is None else Path(config.include_path),
        limit=config.limit,
        batch_size=config.batch_size,
        seed=config.seed,
        num_fewshot=config.num_fewshot,
        apply_chat_template=config.apply_chat_template,
    )


def _generation(tokenizers: Sequence[Any], prompt: str, first: list[int], second: list[int]) -> dict[str, Any]:
    same = next((place for place, pair in enumerate(zip(first, second, strict=False)) if pair[0] != pair[1]), None)
    return {
        "prompt": prompt,
        **{
            side: tokenizer.decode(tokens, skip_special_tokens=True)
            for side, tokenizer, tokens in zip(SIDES, tokenizers, (first, second), strict=True)
        },
        "tokens": {"a": len(first), "b": len(second)},
        "same_tokens": min(len(first), len(second)) if same is None else same,
    }
