"""Compress Hugging Face transformer checkpoints by low-rank factorization.

``import lowrank_compress`` is all that ``AutoModel*.from_pretrained`` needs to load a compressed checkpoint. It imports
neither torch nor transformers: a finder waits for transformers to import its table of quantizers, then adds ours. For
the same reason what programs call (`compress`, `evaluate`, `compare`, `load`) is imported when it is first asked for.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lowrank_compress.api import Result, compress, evaluate, load
    from lowrank_compress.errors import LrcError
    from lowrank_compress.recipe import Recipe
    from lowrank_compress.stages.contrast import compare

__version__ = "0.1.0"
__all__ = ["LrcError", "Recipe", "Result", "compare", "compress", "evaluate", "load"]

_HOME = {"Recipe": "recipe", "LrcError": "errors", "compare": "stages.contrast"}  # the others are in api.py


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(f"{__name__}.{_HOME.get(name, 'api')}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


_TABLE = "transformers.quantizers.auto"


def _register() -> None:
    """Import the module that registers our quantizer as it is imported."""
    importlib.import_module(f"{__name__}.shipped.quantizer")


class _ThenRegister(Loader):
    """Runs a module's own loader, and then `_register`."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Leave the choice of module object to the real loader."""
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Execute the module as if we had never been here, then register."""
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        if _finder in sys.meta_path:
            sys.meta_path.remove(_finder)
        _register()


class _TableFinder(MetaPathFinder):
    """Finds transformers' table of quantizers where the other finders do, but has it loaded by `_ThenRegister`."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Answer for that one module only."""
        if fullname != _TABLE:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _ThenRegister(spec.loader)
                return spec
        return None


_finder = _TableFinder()
if _TABLE in sys.modules:
    _register()
else:
    sys.meta_path.insert(0, _finder)
