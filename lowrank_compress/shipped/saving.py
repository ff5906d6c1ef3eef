"""What ``save_pretrained`` writes beside the weights, so that the copy loads as the original did."""

from __future__ import annotations

import importlib
import weakref
from pathlib import Path
from typing import Any

import transformers

from .config import IN_PACKAGE, REMOTE_FILE
from .linear import CompressedLinear
from .modules import find

# The auto classes of transformers, and the classes of remote code that each of them calls.
REMOTE_CLASSES = {
    "AutoConfig": "LowRankAutoConfig",
    "AutoModel": "LowRankModel",
    "AutoModelForCausalLM": "LowRankForCausalLM",
    "AutoModelForMaskedLM": "LowRankForMaskedLM",
    "AutoModelForSequenceClassification": "LowRankForSequenceClassification",
    "AutoModelForTokenClassification": "LowRankForTokenClassification",
    "AutoModelForQuestionAnswering": "LowRankForQuestionAnswering",
}


def remote_code_entries(config: Any) -> dict[str, str]:
    """Build the ``auto_map`` of a compressed checkpoint: the auto classes that know `config`'s type."""
    return {
        auto_class: f"{Path(REMOTE_FILE).stem}.{remote}"
        for auto_class, remote in REMOTE_CLASSES.items()
        if auto_class == "AutoConfig" or type(config) in getattr(transformers, auto_class)._model_mapping
    }


def remote_code() -> bytes:
    """Return the file that checkpoints carry: this one; or, of the package's, all joined."""
    if not IN_PACKAGE:
        return Path(__file__).read_bytes()
    return importlib.import_module(f"{__package__}.join").joined().encode()


def write_remote_code(directory: Any) -> Path:
    """Put that file, byte for byte, into a checkpoint's directory."""
    Path(directory).mkdir(parents=True, exist_ok=True)
    target, code = Path(directory) / REMOTE_FILE, remote_code()
    if not target.exists() or target.read_bytes() != code:
        target.write_bytes(code)
    return target


def _describe(model: Any) -> None:
    """Let the config say what the layers are now: a merged adapter has made ranks larger."""
    found = getattr(model.config, "quantization_config", None)
    entries = found.get("modules", {}) if isinstance(found, dict) else getattr(found, "modules", {})
    for path in entries:
        layer = find(model, path)[1]
        if isinstance(layer, CompressedLinear):
            entries[path] = layer.entry


class Saver:
    """A loaded model's ``save_pretrained`` that also writes the remote code: the copy loads as the original did.

    It stands in the model's ``__dict__``. Its reference is weak, so that a deleted model frees its memory at once.
    """

    def __init__(self, model: Any) -> None:
        self.model = weakref.ref(model)

    def __call__(self, save_directory: Any, is_main_process: bool = True, *args: Any, **kwargs: Any) -> Any:
        """Save as the model's class does, and the remote code."""
        model = self.model()
        if model is None:
            raise ReferenceError("the model of this save_pretrained is gone: keep it in a variable until it is saved")
        model.config.auto_map = remote_code_entries(model.config)
        _describe(model)
        if is_main_process:
            write_remote_code(save_directory)
        return type(model).save_pretrained(model, save_directory, is_main_process, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Saver:
        return Saver(memo.get(id(self.model()), self.model()))

    def __reduce__(self) -> Any:
        return Saver, (self.model(),)
