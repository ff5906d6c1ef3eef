"""Two models beside each other: on texts, on tasks, and in what they write."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from lowrank_compress.calibration.masking import frame_of, readings_of
from lowrank_compress.calibration.sources import Source
from lowrank_compress.calibration.tokens import load_tokenizer, vocabulary_of
from lowrank_compress.config import CompareConfig
from lowrank_compress.errors import InputError
from lowrank_compress.evaluation.contrast import Contrast, Judge, contrast
from lowrank_compress.evaluation.exam import Exam
from lowrank_compress.evaluation.findings import SIDES, Draws, of_examples, of_pairs, of_tasks, of_text
from lowrank_compress.evaluation.generation import continued
from lowrank_compress.evaluation.harness import Answers, run_tasks
from lowrank_compress.model.blueprint import Blueprint, blueprint
from lowrank_compress.model.checkpoint import Checkpoint
from lowrank_compress.model.embedding import longest_of
from lowrank_compress.model.skeleton import Skeleton
from lowrank_compress.model.tasks import unit_of_loss
from lowrank_compress.model.walk.batch import Batch
from lowrank_compress.resources.workers import started
from lowrank_compress.stages.contamination import refuse_calibration_text
from lowrank_compress.stages.environment import compute_device
from lowrank_compress.stages.examining import exam_of
from lowrank_compress.stages.opponents import (
    checkpoint_at,
    require_one_kind,
    require_one_tokenizer,
    require_same_windows,
    require_use,
)
from lowrank_compress.stages.reading import masked_text_batches, text_batches
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
        A table of labelled examples, as the head of the models reads it.
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
            "There is nothing to compare on. Pass --perplexity TEXT (heads with labels: --classification TABLE; "
            "embedding models: --sts PAIRS), --tasks NAMES or --prompt TEXT."
        )
    if config.by_position:
        raise InputError("lrc compare does not part windows by position; lrc eval does, for each model by itself.")
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

    def contrasted(name: str, batches: Sequence[Batch], judge: Judge | None = None) -> Contrast:
        one, other = (Skeleton(each, torch.device(config.device), torch.float32) for each in checkpoints)
        return contrast(one, other, batches, partial(reporter.advance, Path(name).name), judge=judge)

    task = plans[0].task
    for name, batches, windows in _texts(targets, config, plans, tokenizers):
        found["texts"][name] = of_text(contrasted(name, batches), draws, windows)
    if config.classification is not None:
        exam, paired = _exam(targets, config, plans, tokenizers)
        made = contrasted(config.classification, exam.batches, exam.judge)
        said = {"loss_unit": unit_of_loss(task, paired), **of_examples(made, exam, draws)}
        found["classification"][config.classification] = said
    for name, pairs, batches in _pairs(targets, config, plans, tokenizers):
        made = contrasted(name, batches)
        found["sts"][name] = of_pairs(made, pairs.firsts, pairs.seconds, pairs.scores, draws)
    if config.tasks or prompts:
        _whole(found, config, prompts, checkpoints, tokenizers, reporter)
    return found


def _texts(
    targets: Sequence[str], config: CompareConfig, plans: Sequence[Blueprint], tokenizers: Sequence[Any]
) -> Iterator[tuple[str, list[Batch], list[int] | None]]:
    """Yield the name and the batches of each text, and of a masked language model which window each sequence is of."""
    vocabulary, masked = vocabulary_of(plans[0].checkpoint), plans[0].task == "masked"
    read = masked_text_batches if masked else text_batches
    for name in config.perplexity:
        source = Source(name, config.text_column)
        made = [read(config, tokenizer, source, _length(config, plans[0]), vocabulary) for tokenizer in tokenizers]
        require_same_windows(targets, tokenizers, made)
        yield name, made[0], readings_of(made[0], frame_of(tokenizers[0])) if masked else None


def _exam(
    targets: Sequence[str], config: CompareConfig, plans: Sequence[Blueprint], tokenizers: Sequence[Any]
) -> tuple[Exam, bool]:
    """Read the labelled examples; say whether they are preferences, too."""
    made = [
        exam_of(config, plan.task, tokenizer, plan.checkpoint, _length(config, plan))
        for plan, tokenizer in zip(plans, tokenizers, strict=True)
    ]
    require_same_windows(targets, tokenizers, [list(exam.batches) for exam in made])
    return made[0], any(batch.paired for batch in made[0].batches)


def _length(config: CompareConfig, plan: Blueprint) -> int:
    return config.seq_len or min(2048, plan.longest_input())


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
