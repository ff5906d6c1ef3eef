"""vLLM's plugin: compressed checkpoints under its Transformers backend, each factor a plain linear layer of its own.

vLLM builds the model by ``from_config``, where our layers come in, replaces every ``nn.Linear`` inside them by its own
class, asks this file's quantization config how that computes (as it is: nothing is quantized), and hands each module
its tensors. It calls `register` by the entry point ``vllm.general_plugins``; nothing else imports this file.

Held against the sources of vLLM 0.33 and a stub with their signatures; not run on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import (  # pyright: ignore[reportMissingImports]
    get_tensor_model_parallel_world_size,
)
from vllm.model_executor.layers.linear import (  # pyright: ignore[reportMissingImports]
    LinearBase,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization import (  # pyright: ignore[reportMissingImports]
    register_quantization_config,
)
from vllm.model_executor.layers.quantization.base_config import (  # pyright: ignore[reportMissingImports]
    QuantizationConfig,
)
from vllm.model_executor.models.utils import AutoWeightsLoader  # pyright: ignore[reportMissingImports]

from lowrank_compress.shipped.attention import CompressedAttention
from lowrank_compress.shipped.config import QUANT_METHOD, LowRankConfig
from lowrank_compress.shipped.formats.base import INDEX_DTYPE
from lowrank_compress.shipped.linear import CompressedLinear

HOW = "serve it with --model-impl transformers --trust-remote-code, or serve what `lrc export --dense` writes"


class LowRankServing(QuantizationConfig):
    """What vLLM takes a compressed checkpoint's ``quantization_config`` for: all its linear layers are as they are."""

    def __init__(self, config: LowRankConfig) -> None:
        super().__init__()
        self.config = config

    def get_name(self) -> str:
        """Its name in config.json."""
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """All that plain layers take."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Any device: there is no kernel of its own."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None beside config.json."""
        return []

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> LowRankServing:
        """Read the entry, as transformers does.

        Raises
        ------
        ValueError
            It is of a version that this code does not know, or tensors are to be split over several devices.
        """
        if (devices := get_tensor_model_parallel_world_size()) > 1:
            raise ValueError(
                f"a compressed checkpoint is served on one device, or on several by pipeline parallelism; got "
                f"tensor parallelism over {devices}. Leave --tensor-parallel-size out, or serve what `lrc export "
                "--dense` writes"
            )
        return cls(LowRankConfig(**config))

    def get_quant_method(self, layer: nn.Module, prefix: str) -> UnquantizedLinearMethod | None:
        """Let a linear layer compute as it is; None for all else, which vLLM leaves as it is then.

        Raises
        ------
        ValueError
            The layer stands where a compressed one is to be: the model was not built by our code.
        """
        if not isinstance(layer, LinearBase):
            return None
        place, _, leaf = prefix.rpartition(".")
        members = [f"{place}.{name}" for name in self.packed_modules_mapping.get(leaf, [leaf])]
        shapes = [self.config.dense_shapes.get(name) for name in members]
        known = [shape[0] for shape in shapes if shape is not None]
        wide = len(known) == len(members) and sum(known) != layer.output_size
        if wide or any(name in self.config.modules for name in members):
            raise ValueError(f"{prefix} is compressed in the checkpoint, but not in the model that was built: {HOW}")
        return UnquantizedLinearMethod()


def load_weights(self: nn.Module, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
    """Take the tensors of a compressed module: indices come to where its weights are, which vLLM's loader leaves out.

    Its model is built with its tensors on no device, and only parameters are given one afterwards.
    """
    found, others = set(), []
    device = next(self.parameters()).device
    for name, tensor in weights:
        if name in self._buffers:
            self._buffers[name] = tensor.to(device, None if tensor.is_floating_point() else INDEX_DTYPE)
            found.add(name)
        else:
            others.append((name, tensor))
    found |= AutoWeightsLoader(self).load_weights(others)
    whole = all(buffer is None or buffer.device.type != "meta" for buffer in self._buffers.values())
    if isinstance(self, CompressedLinear) and whole:
        for part in self.parts:
            part.check(self, type(self).__name__)
        self.remember_order()
    return found


def register() -> None:
    """Make this known to vLLM; it may call this more than once."""
    register_quantization_config(QUANT_METHOD)(LowRankServing)
    for kind in (CompressedLinear, CompressedAttention):
        kind.load_weights = load_weights  # pyright: ignore[reportAttributeAccessIssue]
