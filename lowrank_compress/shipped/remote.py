"""What the auto classes call in a checkpoint's copy of this code; hands over to the native class."""

from __future__ import annotations

from typing import Any, ClassVar

import transformers
from transformers.quantizers.auto import AutoHfQuantizer

from .quantizer import register


class _Remote:
    """Loads with the native class, once the quantizer is in place."""

    auto_class: ClassVar[str]

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Do nothing: the native class stays what it is."""

    @classmethod
    def from_pretrained(cls, path: Any, *args: Any, **kwargs: Any) -> Any:
        """Register this copy's quantizer, unless the package's is, and load with the native class."""
        register()
        # An auto class that has found an adapter hands over the base model's path; the native one finds both again.
        adapter_kwargs = dict(kwargs.pop("adapter_kwargs", None) or {})
        path = adapter_kwargs.pop("_adapter_model_path", path)
        kwargs |= {"adapter_kwargs": adapter_kwargs, "trust_remote_code": False}
        return getattr(transformers, cls.auto_class).from_pretrained(path, *args, **kwargs)

    @classmethod
    def _from_config(cls, config: Any, **kwargs: Any) -> Any:
        register()
        model = getattr(transformers, cls.auto_class).from_config(config, **{**kwargs, "trust_remote_code": False})
        found = getattr(config, "quantization_config", None)
        # Who has taken that entry out wants a stock model.
        return model if found is None else AutoHfQuantizer.from_config(found, pre_quantized=True).build(model)


class LowRankAutoConfig(_Remote):
    """Remote code for ``AutoConfig``, which all programs that load a model call first, with its flag for remote code.

    The config is the native one, so that from here on the model is to them one that transformers has itself.
    """

    auto_class = "AutoConfig"

    @classmethod
    def from_pretrained(cls, path: Any, *args: Any, **kwargs: Any) -> Any:
        """Register this copy's quantizer, unless the package's is, and read the config as transformers does."""
        register()
        return transformers.AutoConfig.from_pretrained(path, *args, **{**kwargs, "trust_remote_code": False})


class LowRankModel(_Remote):
    """Remote code for ``AutoModel``."""

    auto_class = "AutoModel"


class LowRankForCausalLM(_Remote):
    """Remote code for ``AutoModelForCausalLM``."""

    auto_class = "AutoModelForCausalLM"


class LowRankForMaskedLM(_Remote):
    """Remote code for ``AutoModelForMaskedLM``."""

    auto_class = "AutoModelForMaskedLM"


class LowRankForSequenceClassification(_Remote):
    """Remote code for ``AutoModelForSequenceClassification``."""

    auto_class = "AutoModelForSequenceClassification"


class LowRankForTokenClassification(_Remote):
    """Remote code for ``AutoModelForTokenClassification``."""

    auto_class = "AutoModelForTokenClassification"


class LowRankForQuestionAnswering(_Remote):
    """Remote code for ``AutoModelForQuestionAnswering``."""

    auto_class = "AutoModelForQuestionAnswering"
