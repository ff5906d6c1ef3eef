"""One checkpoint whose speed is measured: its phases, its memory, what it reads."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, StaticCache

from lowrank_compress.model.checkpoint import Checkpoint
from lowrank_compress.model.tasks import AUTO, Task

# What is timed: a language model reads a prompt and then generates; a classifier only reads.
PHASES: Mapping[Task, tuple[str, ...]] = {
    "lm": ("prefill", "decode"),
    "classification": ("forward",),
    **dict.fromkeys(("embedding", "scores", "labels", "tokens", "answers", "masked"), ("forward",)),
}
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
    """Bytes that a cache adds for every token: keys and values, or what it keeps in their place."""
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
        model: Any = AUTO[task].from_pretrained(
            checkpoint.path,
            dtype=checkpoint.dtype if settings.dtype is None else getattr(torch, settings.dtype),
            attn_implementation=settings.attention,
        )
        self.model = model.to(self.device).eval()
        self.weights, self.read = weight_bytes(self.model)
        self.kv_bytes_per_token = 0.0
        self.itemsize = self.model.dtype.itemsize
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
        if self.task != "lm":
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
