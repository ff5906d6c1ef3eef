"""Tasks of lm-eval, through its Python API."""

from __future__ import annotations

import importlib
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowrank_compress.errors import InputError

# lm-eval draws this many bootstrap samples for standard errors; its default costs seconds a task.
BOOTSTRAP = 1000
# Names of data files in a task's YAML.
_FILE_NAMES = re.compile(r"[^\s\"',\[\]{}]+\.(?:jsonl?|csv|tsv|txt|parquet)")
# Imported when called: they take seconds.
_MODULES = ("lm_eval", "lm_eval.tasks", "lm_eval.models.huggingface")


@dataclass(frozen=True)
class Answers:
    """What a model reached on tasks.

    Attributes
    ----------
    values
        Task -> metric -> value.
    examples
        Task -> metric -> the value of each example, in the task's order; of metrics that are means of such.
    """

    values: Mapping[str, Mapping[str, float]]
    examples: Mapping[str, Mapping[str, Sequence[float]]]


def harness_version() -> str:
    """Version of the installed lm-eval."""
    return version("lm_eval")


def task_files(directory: Path) -> list[Path]:
    """List the task files below a directory and the local data files that they name."""
    files = sorted(directory.rglob("*.yaml"))
    named = [name for path in files for name in _FILE_NAMES.findall(path.read_text(encoding="utf-8"))]
    return files + sorted({Path(name) for name in named if Path(name).is_file()})


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    include_path: Path | None,
    limit: int | None,
    batch_size: int,
    seed: int,
    num_fewshot: int | None = None,
    apply_chat_template: bool = False,
    rank: int = 0,
    processes: int = 1,
) -> Answers:
    """Evaluate a model on lm-eval tasks.

    Parameters
    ----------
    model, tokenizer
        A causal language model in memory.
    tasks
        Names of tasks.
    include_path
        A directory of task YAML files. The built-in tasks are indexed only where a name is not found there.
    limit
        Examples a task; None for all.
    batch_size, seed
        Passed on; all of lm-eval's seeds are set.
    num_fewshot, apply_chat_template
        Passed on: solved examples before each (None: as the task says), and whether prompts are put into the
        tokenizer's chat template.
    rank, processes
        Which process of how many this is; they share the requests, and the first gets the results.

    Returns
    -------
    Answers
        All values; nothing in other processes than the first.

    Raises
    ------
    InputError
        A task is unknown, or its data cannot be had; or the tokenizer has no chat template, and one is asked for.
    """
    if apply_chat_template and not getattr(tokenizer, "chat_template", None):
        raise InputError(
            "--apply-chat-template: expected a tokenizer with a chat template; this has none. Leave it out."
        )
    lm_eval, harness, huggingface = map(importlib.import_module, _MODULES)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if include_path is not None and not include_path.is_dir():
        raise InputError(f"--include-path {include_path} is no directory; expected one with lm-eval task YAML files.")
    local = harness.TaskManager(include_path=str(include_path), include_defaults=False) if include_path else None
    manager = local if local and all(task in local.all_tasks for task in tasks) else None
    if manager is None:
        manager = harness.TaskManager(include_path=str(include_path) if include_path else None)
    missing = [task for task in tasks if task not in manager.all_tasks]
    if missing:
        own = ", ".join(sorted(local.all_tasks)) if local else "none: no --include-path was given"
        raise InputError(
            f"lm-eval knows no task {', '.join(map(repr, missing))}. Tasks of --include-path: {own}. "
            "`lm_eval ls tasks` prints the built-in ones."
        )
    adapter = huggingface.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    if processes > 1:
        _share_requests(adapter, rank, processes)
    try:
        found: Any = lm_eval.simple_evaluate(
            model=adapter,
            tasks=list(tasks),
            task_manager=manager,
            limit=limit,
            num_fewshot=num_fewshot,
            apply_chat_template=apply_chat_template,
            bootstrap_iters=BOOTSTRAP,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
            verbosity="ERROR",
        )
    except (OSError, ConnectionError, ValueError) as problem:
        first = (str(problem).strip().splitlines() or [type(problem).__name__])[0]
        raise InputError(f"lm-eval could not run {', '.join(tasks)}: {first}") from problem
    return Answers(_by_task(found, rank), _by_example(found))


def _by_example(found: Any) -> dict[str, dict[str, list[float]]]:
    """Take what each example got out of lm-eval's results."""
    examples: dict[str, dict[str, list[float]]] = {}
    for task, samples in ({} if found is None else found.get("samples") or {}).items():
        # A task may be filtered in several ways: then each example is there as often.
        for sample in sorted(samples, key=lambda each: each["doc_id"]):
            for metric in sample["metrics"]:
                value, named = sample.get(metric), _metric_name(metric, sample["filter"])
                if isinstance(value, int | float):
                    examples.setdefault(task, {}).setdefault(named, []).append(float(value))
    return examples


def _metric_name(metric: str, how: str) -> str:
    """Name a metric as lm-eval's results do, but for the filter that is none."""
    return f"{metric},{how}".removesuffix(",none")


def _by_task(found: Any, rank: int) -> dict[str, dict[str, float]]:
    """Take the numbers out of lm-eval's results, which it gives to the first process alone."""
    if found is None and rank > 0:
        return {}
    if found is None:
        raise InputError(
            "lm-eval gave no results: it takes this process for another than the first, because LOCAL_RANK is set. "
            "Unset LOCAL_RANK, or start the processes by torchrun."
        )
    return {
        task: {
            name.removesuffix(",none"): float(value)
            for name, value in metrics.items()
            if isinstance(value, int | float) and name != "sample_len"
        }
        for task, metrics in found["results"].items()
    }


def _share_requests(adapter: Any, rank: int, processes: int) -> None:
    """Let lm-eval divide its requests among processes as it does under its own launcher, which loads models itself."""
    adapter._rank, adapter._world_size = rank, processes
    adapter.accelerator = importlib.import_module("accelerate").Accelerator(cpu=adapter.device.type == "cpu")
