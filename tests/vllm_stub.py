"""As much of vLLM as our plugin meets: the same names and signatures as in vLLM 0.33, on a CPU, and little behind them.

vLLM itself cannot be installed beside other versions of torch, and computes on GPUs.
"""

from __future__ import annotations

import itertools
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

devices = 1
"""Of tensor parallelism."""


def get_tensor_model_parallel_world_size() -> int:
    return devices


class QuantizationConfig(ABC):
    def __init__(self) -> None:
        super().__init__()
        self.packed_modules_mapping: dict[str, list[str]] = {}

    @abstractmethod
    def get_name(self) -> str: ...

    @abstractmethod
    def get_supported_act_dtypes(self) -> list[torch.dtype]: ...

    @classmethod
    @abstractmethod
    def get_min_capability(cls) -> int: ...

    @staticmethod
    @abstractmethod
    def get_config_filenames() -> list[str]: ...

    @classmethod
    @abstractmethod
    def from_config(cls, config: dict[str, Any]) -> QuantizationConfig: ...

    @abstractmethod
    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any: ...


METHODS: dict[str, type[QuantizationConfig]] = {}


def register_quantization_config(quantization: str) -> Callable[[type], type]:
    def wrapper(kind: type) -> type:
        assert issubclass(kind, QuantizationConfig)
        METHODS[quantization] = kind
        return kind

    return wrapper


class UnquantizedLinearMethod:
    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        empty = torch.empty(sum(output_partition_sizes), input_size_per_partition, dtype=params_dtype)
        layer.register_parameter("weight", nn.Parameter(empty, requires_grad=False))
        layer.weight.weight_loader = extra_weight_attrs["weight_loader"]

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return nn.functional.linear(x, layer.weight, bias)


class LinearBase(nn.Module):
    def __init__(
        self,
        input_size: int,
        output_size: int,
        bias: bool = False,
        params_dtype: torch.dtype | None = None,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
        *,
        return_bias: bool = True,
    ) -> None:
        super().__init__()
        self.input_size, self.output_size, self.return_bias = input_size, output_size, return_bias
        method = None if quant_config is None else quant_config.get_quant_method(self, prefix=prefix)
        if method is None:
            raise ValueError("All linear layers should support quant method.")
        self.quant_method = method
        dtype = params_dtype or torch.get_default_dtype()
        method.create_weights(
            self, input_size, [output_size], input_size, output_size, dtype, weight_loader=self.weight_loader
        )
        self.bias = nn.Parameter(torch.empty(output_size, dtype=dtype)) if bias else None

    def weight_loader(self, param: nn.Parameter, loaded_weight: Tensor) -> None:
        assert param.shape == loaded_weight.shape
        param.data.copy_(loaded_weight)

    def forward(self, x: Tensor) -> Any:
        y = self.quant_method.apply(self, x, self.bias)
        return (y, None) if self.return_bias else y


class AutoWeightsLoader:
    """Hands tensors to modules by the parts of their names; those with a `load_weights` get all of theirs at once."""

    def __init__(self, module: nn.Module, *, ignore_unexpected_prefixes: list[str] | None = None) -> None:
        self.module = module

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], *, mapper: Any = None) -> set[str]:
        return set(self._load("", self.module, weights))

    def _load(self, prefix: str, module: nn.Module, weights: Iterable[tuple[str, Tensor]]) -> Iterator[str]:
        if module is not self.module and callable(own := getattr(module, "load_weights", None)):
            yield from (f"{prefix}{name}" for name in own(weights))
            return
        children = dict(module.named_children())
        # Buffers count, but a copy into one that is on no device is lost.
        tensors = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
        parted = ((*name.partition("."), tensor) for name, tensor in weights)
        for first, group in itertools.groupby(parted, key=lambda each: each[0]):
            inside = [(rest, tensor) for _, _, rest, tensor in group]
            if first in children:
                yield from self._load(f"{prefix}{first}.", children[first], inside)
                continue
            if first not in tensors:
                raise ValueError(f"There is no module or parameter named {prefix}{first!r}")
            for _, tensor in inside:
                loader = getattr(tensors[first], "weight_loader", lambda param, loaded: param.data.copy_(loaded))
                loader(tensors[first], tensor)
                yield f"{prefix}{first}"


@contextmanager
def init_on_device_without_buffers(device: str) -> Iterator[None]:
    old = nn.Module.register_parameter

    def register(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        old(module, name, param)
        if param is not None:
            module._parameters[name] = nn.Parameter(param.to(device), requires_grad=param.requires_grad)

    nn.Module.register_parameter = register  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = old  # type: ignore[method-assign]


class Attention(nn.Module):
    """All heads of the size that the cache has; inputs and outputs with the heads joined."""

    def __init__(self, num_heads: int, head_size: int, scale: float, num_kv_heads: int) -> None:
        super().__init__()
        self.sizes, self.scale = (num_heads, num_kv_heads, head_size), scale

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        heads, kv_heads, size = self.sizes
        assert query.shape[1:] == (heads * size,)
        assert key.shape[1:] == value.shape[1:] == (kv_heads * size,)
        q, k, v = (
            x.view(len(x), n, size).transpose(0, 1) for x, n in ((query, heads), (key, kv_heads), (value, kv_heads))
        )
        k, v = (x.repeat_interleave(heads // kv_heads, 0) for x in (k, v))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale)
        return y.transpose(0, 1).flatten(1)


def vllm_attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    tokens = query.shape[-2]
    flat = (x.transpose(1, 2).reshape(tokens, -1) for x in (query, key, value))
    return module.attn(*flat), None


def installed(patch: pytest.MonkeyPatch) -> None:
    """Let these be imported as vLLM's modules are."""
    here = globals()
    places = {
        "vllm": (),
        "vllm.distributed": ("get_tensor_model_parallel_world_size",),
        "vllm.model_executor": (),
        "vllm.model_executor.layers": (),
        "vllm.model_executor.layers.linear": ("LinearBase", "UnquantizedLinearMethod"),
        "vllm.model_executor.layers.quantization": ("register_quantization_config",),
        "vllm.model_executor.layers.quantization.base_config": ("QuantizationConfig",),
        "vllm.model_executor.models": (),
        "vllm.model_executor.models.utils": ("AutoWeightsLoader",),
    }
    for place, names in places.items():
        made = ModuleType(place)
        made.__path__ = []
        for name in names:
            setattr(made, name, here[name])
        patch.setitem(sys.modules, place, made)
    patch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "vllm", vllm_attention_forward)


def served(model: nn.Module, config: Any, quant_config: QuantizationConfig) -> None:
    """Do to a model on no device what the Transformers backend does: our linear layers in, then memory for the rest."""

    def replace(module: nn.Module, prefix: str) -> None:
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                made = LinearBase(
                    input_size=child.in_features,
                    output_size=child.out_features,
                    bias=child.bias is not None,
                    quant_config=quant_config,
                    prefix=f"{prefix}.{name}",
                    return_bias=False,
                )
                setattr(module, name, made)
            else:
                replace(child, f"{prefix}.{name}")

    replace(model, "model")
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.device.type == "meta":
                setattr(module, name, nn.Parameter(torch.empty_like(parameter, device="cpu")))
        if isinstance(getattr(module, "layer_idx", None), int):
            size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
            module.attn = Attention(config.num_attention_heads, size, module.scaling, config.num_key_value_heads)
