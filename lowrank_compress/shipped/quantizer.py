"""The quantizer, by which ``from_pretrained`` builds compressed modules; it is registered at once."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer

from .adapters import adapt_peft
from .config import IN_PACKAGE, QUANT_METHOD, LowRankConfig
from .experts import join_experts
from .formats.base import INDEX_DTYPE
from .latent import LatentAttention
from .linear import CompressedLinear
from .restore import restore_modules
from .router import require_all_experts
from .saving import Saver
from .swap import check_indices, swap_modules

# Where the package's quantizer says that it is from. Copies in checkpoints, those of earlier versions too, know it by
# this name from each other, and leave it in place.
PACKAGE = "lowrank_compress.model.layers"


class LowRankQuantizer(HfQuantizer):
    """Lets ``from_pretrained`` build a compressed model; afterwards the model is an ordinary floating-point one."""

    if IN_PACKAGE:
        __module__ = PACKAGE

    requires_calibration = True
    quantization_config: LowRankConfig

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        swap_modules(model, self.quantization_config)
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for module in model.modules():
            if isinstance(module, transformers.PreTrainedModel):
                # Else .half() and .float() raise; no weight is quantized.
                module.__dict__["is_quantized"] = False
                module.config.__dict__["_is_quantized"] = False
            for name, buffer in list(module._buffers.items()):
                # Checkpoints of version 1 have wider ones.
                if name.startswith(("lr_index", "lr_rotary")) and buffer is not None and buffer.device.type != "meta":
                    module._buffers[name] = buffer.to(INDEX_DTYPE)
        check_indices(model)
        for module in model.modules():
            if isinstance(module, CompressedLinear):
                module.remember_order()
        model.save_pretrained = Saver(model)
        return model

    @torch.no_grad()
    def build(self, model: Any) -> Any:
        """Make a stock model, as ``from_config`` builds it, the compressed one, in place; return it.

        What is on a real device starts from random weights, drawn as the family draws those of its linear layers.
        """
        self._process_model_before_weight_loading(model)
        for attention in model.modules():
            if isinstance(attention, LatentAttention):
                model._init_weights(attention.lr_latent)
                model._init_weights(attention.lr_rebuild)
        for module in model.modules():
            if isinstance(module, CompressedLinear) or hasattr(module, "lr_stock"):
                for linear in module.modules():
                    model._init_weights(linear)
                if module.bias is not None:
                    module.bias.zero_()
        model.hf_quantizer = self
        return self._process_model_after_weight_loading(model)

    def is_serializable(self, *args: Any, **kwargs: Any) -> Any:
        """Say that ``save_pretrained`` may write the factors."""
        return True

    @property
    def is_trainable(self) -> Any:
        """True: the factors are ordinary parameters."""
        return True

    @property
    def is_compileable(self) -> bool:
        """True: the layer is a few matrix products."""
        return True

    def dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        """Turn `model` in place into the stock dense model, in the dtype of its factors or in `dtype`; return it."""
        model = self._dequantize(model)
        for owner, name in ((model, "hf_quantizer"), (model, "quantization_method"), (model, "save_pretrained")):
            owner.__dict__.pop(name, None)
        for name in ("quantization_config", "auto_map", "_pre_quantization_dtype"):  # the last: transformers 4
            model.config.__dict__.pop(name, None)
        model.is_quantized = False
        return model if dtype is None else model.to(dtype)

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        require_all_experts(model)
        restore_modules(model)
        join_experts(model)
        return model

    def __reduce__(self) -> Any:
        # Its class is not where pickle would look it up.
        return _blank_quantizer, (), self.__dict__


def _blank_quantizer() -> LowRankQuantizer:
    """Make a quantizer without any attribute, for ``pickle`` and ``copy`` to fill."""
    return LowRankQuantizer.__new__(LowRankQuantizer)


def register() -> None:
    """Make transformers load checkpoints with this file's quantizer, unless that of the package is already in place.

    Calling it again does nothing; of several checkpoints' copies the one that loads now is in place.
    """
    present = AUTO_QUANTIZER_MAPPING.get(QUANT_METHOD)
    if present is not None and present.__name__ != LowRankQuantizer.__name__:
        raise RuntimeError(f"another quantizer, {present}, is already registered as {QUANT_METHOD!r}")
    if present is None or present.__module__ != PACKAGE:
        AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = LowRankConfig
        AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = LowRankQuantizer
        adapt_peft()


register()
