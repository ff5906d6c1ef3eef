"""A model on the meta device whose blocks are materialised one at a time."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PretrainedConfig, PreTrainedModel

from lowrank_compress.arch.resolve import Resolved, resolve
from lowrank_compress.arch.table import architecture_of
from lowrank_compress.errors import CheckpointError, UnsupportedError
from lowrank_compress.model.checkpoint import Checkpoint
from lowrank_compress.model.layers import LowRankConfig, swap_modules

Task = Literal["lm", "classification"]


def task_of(config: PretrainedConfig) -> Task:
    """Tell a causal language model from a sequence classifier by the config's `architectures`.

    Raises
    ------
    UnsupportedError
        It is neither.
    """
    named = (getattr(config, "architectures", None) or ["(none)"])[0]
    if named.endswith(("ForCausalLM", "LMHeadModel")):
        return "lm"
    if named.endswith("ForSequenceClassification"):
        return "classification"
    raise UnsupportedError(
        f"The checkpoint's head is {named}; supported are causal language models (…ForCausalLM, …LMHeadModel) and "
        "sequence classifiers (…ForSequenceClassification), as `architectures` of config.json names them."
    )


def build_meta(config: PretrainedConfig) -> PreTrainedModel:
    """Build the dense model of a config on the meta device, in evaluation mode, with no memory for weights."""
    auto = AutoModelForCausalLM if task_of(config) == "lm" else AutoModelForSequenceClassification
    config = copy.deepcopy(config)
    config.use_cache = False
    with torch.device("meta"):
        model = auto.from_config(config)
    return model.eval().requires_grad_(False)


def meta_model(checkpoint: Checkpoint) -> tuple[PreTrainedModel, Resolved]:
    """Build a checkpoint's dense model on the meta device and resolve its targets.

    Raises
    ------
    UnsupportedError
        The family or the head is not supported.
    """
    config = checkpoint.config
    architecture_of(config)
    stored = getattr(config, "quantization_config", None)
    if stored is not None:
        method = stored.get("quant_method") if isinstance(stored, dict) else stored.quant_method
        if method != "lowrank":
            raise UnsupportedError(
                f"{checkpoint.path} is quantized ({method}); expected plain floating-point weights. "
                "Compress the unquantized checkpoint."
            )
    model = build_meta(config)
    return model, resolve(model)


class Skeleton:
    """A model whose parameters outside the blocks are loaded and whose blocks are materialised on demand.

    Peak memory is what lies outside the blocks, plus one block.

    Parameters
    ----------
    checkpoint
        A dense checkpoint, or one that this package compressed.
    device
        Where to compute.
    dtype
        Floating-point type to compute in; stored weights are cast to it.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
        self.checkpoint = checkpoint
        self.device = device
        self.dtype = dtype
        self.task: Task = task_of(checkpoint.config)
        self.model, self.resolved = meta_model(checkpoint)
        stored = checkpoint.raw_config.get("quantization_config")
        if stored is not None:
            swap_modules(self.model, LowRankConfig.from_dict(stored))
            self.model.requires_grad_(False)
        self._load_outside()

    @property
    def blocks(self) -> list[nn.Module]:
        """The transformer blocks, on the meta device unless inside `block(i)`."""
        return [self.model.get_submodule(name) for name in self.resolved.blocks]

    def _load_outside(self) -> None:
        inside = tuple(f"{name}." for name in self.resolved.blocks)
        model = self.model
        names = [name for name in model.state_dict() if not name.startswith(inside)]
        tied = set(getattr(model, "all_tied_weights_keys", {}) or {})
        found = {name: stored for name in names if (stored := self._stored(name)) is not None}
        for name in names:
            if name not in found and name not in tied:
                raise self._missing(name)
        model.load_state_dict({name: self._read(stored) for name, stored in found.items()}, strict=False, assign=True)
        if tied:
            model.tie_weights()
        for name, module in model.named_modules():
            if not f"{name}.".startswith(inside):
                self._restore_buffers(module)
        model.requires_grad_(False)

    def _stored(self, name: str) -> str | None:
        return self.checkpoint.name_on_disk(name, self.model.base_model_prefix)

    def _missing(self, name: str) -> CheckpointError:
        return CheckpointError(
            f"{self.checkpoint.path} has no tensor {name}, which its config asks for. The checkpoint is incomplete, or its "
            "config.json belongs to another one."
        )

    def _read(self, stored: str) -> Tensor:
        tensor = self.checkpoint.read(stored)
        return tensor.to(self.device, self.dtype if tensor.is_floating_point() else None)

    def _restore_buffers(self, module: nn.Module) -> None:
        """Compute buffers that no checkpoint holds (rotary tables, position ids), the way transformers does."""
        lost = {name: value for name, value in module._buffers.items() if value is not None and value.is_meta}
        if lost:
            for name, value in lost.items():
                module._buffers[name] = torch.empty_like(value, device=self.device)
            self.model._init_weights(module)

    @contextmanager
    def block(self, index: int) -> Iterator[nn.Module]:
        """Materialise one block; on leaving it goes back to the meta device.

        Raises
        ------
        CheckpointError
            One of its tensors is missing or not finite.
        """
        prefix = self.resolved.blocks[index]
        block = self.model.get_submodule(prefix)
        state = {}
        for name in block.state_dict():
            stored = self._stored(f"{prefix}.{name}")
            if stored is None:
                raise self._missing(f"{prefix}.{name}")
            state[name] = self._read(stored)
        block.load_state_dict(state, assign=True)
        for module in block.modules():
            self._restore_buffers(module)
        block.requires_grad_(False)
        try:
            yield block
        finally:
            block.to("meta")


def longest_input(model: PreTrainedModel) -> int:
    """The longest sequence, special tokens included, that a model has positions for."""
    declared = getattr(model.config, "max_position_embeddings", None) or getattr(model.config, "n_positions", None)
    limit = int(declared) if declared else 1 << 20
    for name, module in model.named_modules():
        # RoBERTa counts positions from behind the padding index.
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            limit = min(limit, module.num_embeddings - module.padding_idx - 1)
    return limit
