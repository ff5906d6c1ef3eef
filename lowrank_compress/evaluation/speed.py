"""How fast checkpoints run, measured in turn in one process: prefill and decode, memory, and what would be possible."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, Cache, DynamicCache, StaticCache

from lowrank_compress.errors import InputError, first_line
from lowrank_compress.evaluation.rounds import Rates, alternate, compare
from lowrank_compress.model.blueprint import Task, blueprint
from lowrank_compress.model.checkpoint import Checkpoint

# What is timed: a language model reads a prompt and then generates; a classifier only reads.
PHASES: Mapping[Task, tuple[str, ...]] = {"lm": ("prefill", "decode"), "classification": ("forward",)}
Clock = Callable[[], float]


@dataclass(frozen=True)
class Settings:
    """What is measured, and how.

    Attributes
    ----------
    batch_sizes, prompt_tokens
        Every combination of the two is measured.
    new_tokens
        Tokens generated after each prompt; a classifier generates none.
    rounds
        Measurements of every model and combination, after one that is not counted.
    seed
        Of the random prompts.
    device, dtype
        Where, and in what; None is each checkpoint's own dtype.
    compile
        Whether the forward passes are compiled; generation then has a static cache, and on a GPU CUDA graphs.
    attention
        ``sdpa`` or ``eager``; None is the first that all models have.
    threads
        CPU threads; None leaves them as they are.
    """

    batch_sizes: tuple[int, ...] = (1, 8)
    prompt_tokens: tuple[int, ...] = (128, 512)
    new_tokens: int = 32
    rounds: int = 5
    seed: int = 0
    device: str = "cpu"
    dtype: str | None = None
    compile: bool = False
    attention: str | None = None
    threads: int | None = None


def random_prompts(vocabulary: int, batch: int, tokens: int, seed: int) -> Tensor:
    """Random token ids, int64 (batch, tokens): the same on every device and for every model."""
    return torch.randint(vocabulary, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def cache_bytes(cache: Any) -> int:
    """Bytes of the keys and values that a cache holds."""
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers if layer.is_initialized)


def weight_bytes(model: nn.Module) -> tuple[int, int]:
    """Count the bytes of a model's weights, and of those of them that each decoded token reads.

    Tied tensors count once. A token reads everything but the embeddings that are only looked up; one that is also the
    head is read in full.
    """
    sizes = {tensor.data_ptr(): tensor.nbytes for tensor in model.state_dict().values()}
    tables: set[int] = set()
    multiplied: set[int] = set()
    for module in model.modules():
        found = tables if isinstance(module, nn.Embedding) else multiplied
        found |= {parameter.data_ptr() for parameter in module.parameters(recurse=False)}
    total = sum(sizes.values())
    return total, total - sum(sizes[pointer] for pointer in tables - multiplied)


class Contestant:
    """One model in memory, ready to be timed.

    Parameters
    ----------
    checkpoint
        Dense or compressed.
    task
        What its head is for.
    settings
        How to load and run it.
    clock
        Seconds.
    """

    def __init__(
        self, checkpoint: Checkpoint, task: Task, settings: Settings, clock: Clock = time.perf_counter
    ) -> None:
        self.settings, self.task, self.clock = settings, task, clock
        self.device = torch.device(settings.device)
        auto = AutoModelForCausalLM if task == "lm" else AutoModelForSequenceClassification
        model: Any = auto.from_pretrained(
            checkpoint.path,
            dtype=checkpoint.dtype if settings.dtype is None else getattr(torch, settings.dtype),
            attn_implementation=settings.attention,
        )
        self.model = model.to(self.device).eval()
        self.weights, self.read = weight_bytes(self.model)
        self.kv_bytes_per_token = 0.0
        # Generation needs the logits of the last position only; for those of a whole prompt some models lack memory.
        parameters = inspect.signature(self.model.forward).parameters
        last = "logits_to_keep" in parameters
        self._cache_name = "cache" if "cache" in parameters else "past_key_values"
        self._options: dict[str, Any] = {"use_cache": True} if task == "lm" else {}
        self._options |= {"logits_to_keep": 1} if last else {}
        self._prefill = self._decode = self.model
        self._cache: Cache | None = None

    def look(self, ids: Tensor) -> None:
        """Run once, uncompiled, and find out what a token adds to the cache."""
        found = self.model(ids.to(self.device), **self._options)
        if self.task == "lm":
            self.kv_bytes_per_token = cache_bytes(found[self._cache_name]) / ids.numel()

    def prepare(self, ids: Tensor) -> int:
        """Get ready for prompts of a shape: compile if that is asked for, and run once; return the memory it took.

        Returns
        -------
        int
            Bytes: on a GPU the peak of what was allocated beyond other models, weights included; else weights and
            cache, computed.
        """
        total = ids.shape[1] + self.settings.new_tokens
        gpu = self.device.type == "cuda"
        before = torch.cuda.memory_allocated(self.device) if gpu else 0
        if gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
        if self.settings.compile:
            self._prefill = torch.compile(self.model.forward, dynamic=False)
            if self.task == "lm":
                mode = "reduce-overhead" if gpu else None
                self._decode = torch.compile(self.model.forward, dynamic=False, mode=mode)
                self._cache = StaticCache(config=self.model.config, max_cache_len=total)
                # Makes the cache's tensors, outside of any graph.
                self.model(ids.to(self.device), **{self._cache_name: self._cache}, **self._options)
        self.measure(ids)
        if gpu:
            return self.weights + torch.cuda.max_memory_allocated(self.device) - before
        return self.weights + round(ids.shape[0] * total * self.kv_bytes_per_token)

    def release(self) -> None:
        """Drop what `prepare` made."""
        self._prefill = self._decode = self.model
        self._cache = None

    def measure(self, ids: Tensor) -> dict[str, float]:
        """Time one forward pass over the prompts and, for a language model, greedy generation after it.

        Returns
        -------
        dict
            Phase -> tokens a second, all sequences of the batch together.
        """
        ids = ids.to(self.device)
        if self.task == "classification":
            start = self._now()
            self._prefill(ids, attention_mask=torch.ones_like(ids))
            return {"forward": ids.numel() / (self._now() - start)}
        if self._cache is not None:
            self._cache.reset()
        cache = DynamicCache(config=self.model.config) if self._cache is None else self._cache
        start = self._now()
        token = self._next(self._prefill, ids, cache)
        middle = self._now()
        for _ in range(self.settings.new_tokens):
            token = self._next(self._decode, token, cache)
        end = self._now()
        return {
            "prefill": ids.numel() / (middle - start),
            "decode": ids.shape[0] * self.settings.new_tokens / (end - middle),
        }

    def _next(self, forward: Callable[..., Any], ids: Tensor, cache: Cache) -> Tensor:
        if self.settings.compile:
            torch.compiler.cudagraph_mark_step_begin()
        logits = forward(ids, **{self._cache_name: cache}, **self._options).logits
        return logits[:, -1:].argmax(-1)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return self.clock()


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
                "limit": limits[name],
            }
            for name, model in models.items()
        },
        "measurements": measurements,
    }
