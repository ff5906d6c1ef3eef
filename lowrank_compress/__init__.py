"""Compress Hugging Face transformer checkpoints by low-rank factorization.

``import lowrank_compress`` is all that ``AutoModel*.from_pretrained`` needs to load a compressed checkpoint. It imports
neither torch nor transformers: a finder waits for transformers to import its table of quantizers, then adds ours. For
the same reason what programs call (`compress`, `evaluate`, `compare`, `load`) is imported when it is first asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lowrank_compress.shipped.imports import when_imported

if TYPE_CHECKING:
    from lowrank_compress.api import Result, compress, evaluate, load
    from lowrank_compress.errors import LrcError
    from lowrank_compress.pages.page import report
    from lowrank_compress.recipe import Recipe
    from lowrank_compress.stages.contrast import compare
    from lowrank_compress.stages.diagnosis import diagnose
    from lowrank_compress.stages.quantization import quantize
    from lowrank_compress.stages.sweep import sweep

__version__ = "0.1.0"
__all__ = [
    "LrcError",
    "Recipe",
    "Result",
    "compare",
    "compress",
    "diagnose",
    "evaluate",
    "load",
    "quantize",
    "report",
    "sweep",
]

_HOME = {
    "Recipe": "recipe",
    "LrcError": "errors",
    "compare": "stages.contrast",
    "diagnose": "stages.diagnosis",
    "quantize": "stages.quantization",
    "report": "pages.page",
    "sweep": "stages.sweep",
}  # the others are in api.py


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(f"{__name__}.{_HOME.get(name, 'api')}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _register() -> None:
    """Import the module that registers our quantizer as it is imported."""
    importlib.import_module(f"{__name__}.shipped.quantizer")


when_imported("transformers.quantizers.auto", _register)
