"""How fast checkpoints run, measured in turn in one process: prefill and decode, memory, and what would be possible."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lowrank_compress.errors import InputError, first_line
from lowrank_compress.evaluation.contestant import Clock, Contestant, Settings, random_prompts
from lowrank_compress.evaluation.rounds import Rates, alternate, compare
from lowrank_compress.evaluation.size import CONTEXT, kv_bytes
from lowrank_compress.model.blueprint import blueprint
from lowrank_compress.model.checkpoint import Checkpoint
from lowrank_compress.model.tasks import Task


def check(checkpoints: Mapping[str, Checkpoint], settings: Settings) -> tuple[Task, Settings]:
    """Make sure that the models can be compared on these lengths; reads headers only.

    Returns
    -------
    task
        What their heads are for.
    settings
        With what was left open decided: the attention; and no new tokens for classifiers.

    Raises
    ------
    LrcError
        A checkpoint is not supported, they are not of one kind, a sequence is longer than a model can take, or a model
        lacks the attention asked for.
    """
    plans = {name: blueprint(checkpoint) for name, checkpoint in checkpoints.items()}
    tasks: dict[str, Task] = {name: plan.task for name, plan in plans.items()}
    if len(set(tasks.values())) > 1:
        named = ", ".join(f"{name} ({task})" for name, task in tasks.items())
        raise InputError(f"Language models and classifiers do not compare: {named}. Pass checkpoints of one kind.")
    task = next(iter(tasks.values()))
    new = settings.new_tokens if task == "lm" else 0
    for name, plan in plans.items():
        longest, asked = plan.longest_input(), max(settings.prompt_tokens)
        if asked + new > longest:
            generated = f" and {new} new ones" if new else ""
            raise InputError(
                f"{asked} prompt tokens{generated} are more than the {longest} positions of {name}. Pass a smaller "
                f"--prompt-tokens{' or --new-tokens' if new else ''}."
            )
    without = [name for name, plan in plans.items() if not plan.model._supports_sdpa]
    if without and settings.attention == "sdpa":
        raise InputError(f"transformers has no sdpa attention for {', '.join(without)}. Pass --attention eager.")
    attention = settings.attention or ("eager" if without else "sdpa")
    return task, replace(settings, attention=attention, new_tokens=new)


@contextmanager
def _pinned(settings: Settings, count: int) -> Iterator[None]:
    """Set what holds for the whole process, for `count` models, and put it back."""
    dynamo: Any = torch._dynamo.config
    threads = torch.get_num_threads()
    torch.set_num_threads(settings.threads or threads)
    try:
        # The models share one function's compiled code; where its cache is full, the rest falls back to eager silently.
        with torch.inference_mode(), dynamo.patch(recompile_limit=8 + 4 * count):
            yield
    except torch.OutOfMemoryError as problem:
        raise InputError(
            f"The {count} models do not fit into the memory of {settings.device} together "
            f"({first_line(problem)}). Pass fewer targets, a smaller --batch-size or --prompt-tokens, "
            "or --device cpu."
        ) from problem
    finally:
        torch.set_num_threads(threads)


def _measure_in_turn(
    models: Mapping[str, Contestant], ids: Tensor, settings: Settings, advance: Callable[[int, int], None]
) -> tuple[dict[str, int], dict[str, list[Rates]]]:
    """Measure all models on the same prompts: name -> bytes of memory, and name -> rates by round."""
    memory: dict[str, int] = {}

    def measure(name: str) -> Rates:
        if name not in memory:  # in the round that warms up
            memory[name] = models[name].prepare(ids)
        return models[name].measure(ids)

    samples = alternate(list(models), settings.rounds, measure, advance)
    for model in models.values():
        model.release()
    if settings.compile:
        torch.compiler.reset()
    return memory, samples


def benchmark(
    checkpoints: Mapping[str, Checkpoint],
    settings: Settings,
    advance: Callable[[str, int, int], None] = lambda step, done, total: None,
    clock: Clock = time.perf_counter,
) -> dict[str, Any]:
    """Measure checkpoints in turn, all in memory together and on the same prompts.

    Parameters
    ----------
    checkpoints
        By name; the first one is the base of the ratios.
    settings
        What to measure.
    advance
        Told about progress: step, done, total.
    clock
        Seconds.

    Returns
    -------
    dict
        ``task``, ``base``, ``settings``, ``threads``, ``memory`` (what the bytes of memory are), ``models`` and
        ``measurements``: see the command's ``--json``. A model's ``limit`` is the bytes of weights that a decoded token
        reads in the base over those it reads in the model: how much faster decoding becomes where reading them is all
        that takes time. ``of_limit`` is the measured ratio over that.

    Raises
    ------
    LrcError
        As `check`; or the models do not fit into a GPU's memory together.
    """
    task, settings = check(checkpoints, settings)
    base = next(iter(checkpoints))
    models: dict[str, Contestant] = {}
    measurements = []
    with _pinned(settings, len(checkpoints)):
        threads = torch.get_num_threads()
        for name, checkpoint in checkpoints.items():
            models[name] = Contestant(checkpoint, task, settings, clock)
            advance("load", len(models), len(checkpoints))
        vocabulary = min(model.model.config.vocab_size for model in models.values())
        shortest = random_prompts(vocabulary, 1, min(settings.prompt_tokens), settings.seed)
        for model in models.values():
            model.look(shortest)
        limits = {name: models[base].read / model.read for name, model in models.items()}
        for batch in settings.batch_sizes:
            for prompt in settings.prompt_tokens:
                step = partial(advance, f"batch {batch} × prompt {prompt}")
                ids = random_prompts(vocabulary, batch, prompt, settings.seed)
                memory, samples = _measure_in_turn(models, ids, settings, step)
                found = compare(samples, base)
                for name, values in found.items():
                    values["memory_bytes"] = memory[name]
                    if "decode" in values:
                        values["decode"]["of_limit"] = values["decode"]["ratio"]["median"] / limits[name]
                measurements.append({"batch_size": batch, "prompt_tokens": prompt, "models": found})
    gpu = torch.device(settings.device).type == "cuda"
    return {
        "task": task,
        "base": base,
        "settings": asdict(settings),
        "threads": threads,
        "memory": "peak allocated for this model" if gpu else "weights and KV cache, computed",
        "models": {
            name: {
                "path": str(checkpoints[name].path),
                "weights_bytes": model.weights,
                "read_bytes_per_token": model.read,
                "kv_bytes_per_token": model.kv_bytes_per_token,
                "kv_bytes_4096": kv_bytes(checkpoints[name], CONTEXT, window=True, itemsize=model.itemsize),
                "limit": limits[name],
            }
            for name, model in models.items()
        },
        "measurements": measurements,
    }
