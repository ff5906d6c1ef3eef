"""Something to do as soon as a module is imported, by whomever."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


class _Following(Loader):
    """Runs a module's own loader, and then what is to follow."""

    def __init__(self, loader: Loader, finder: _Waiting) -> None:
        self.loader, self.finder = loader, finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Leave the choice of module object to the real loader."""
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Execute the module as if we had never been here, then what is to follow."""
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        if self.finder in sys.meta_path:
            sys.meta_path.remove(self.finder)
        self.finder.then()


class _Waiting(MetaPathFinder):
    """Finds one module where the other finders do, but has it loaded by `_Following`."""

    def __init__(self, name: str, then: Callable[[], object]) -> None:
        self.name, self.then, self.asking = name, then, False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Answer for that one module only, and not while asking the others, among whom may be more of this kind."""
        if fullname != self.name or self.asking:
            return None
        self.asking = True
        try:
            for finder in sys.meta_path:
                spec = finder.find_spec(fullname, path, target)
                if spec is not None:
                    if spec.loader is not None:
                        spec.loader = _Following(spec.loader, self)
                    return spec
            return None
        finally:
            self.asking = False


def when_imported(name: str, then: Callable[[], object]) -> None:
    """Call a function now, if a module is imported already, or else at the end of its import."""
    if name in sys.modules:
        then()
    else:
        sys.meta_path.insert(0, _Waiting(name, then))
