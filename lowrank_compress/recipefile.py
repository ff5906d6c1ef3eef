"""Recipe files: YAML that names each option once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from lowrank_compress.artifacts.files import read_small_text
from lowrank_compress.errors import ArtifactError, InputError

RECIPE_BYTES = 1 << 20


class _Loader(yaml.SafeLoader):
    """YAML without aliases, which a small file can explode with, and without a key twice."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it uses an alias (*), which a recipe has no need of")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        names = [self.construct_object(key, deep=True) for key, _ in node.value]
        for name in names:
            if not isinstance(name, str):
                raise yaml.YAMLError(f"the key {name!r} is no text; expected the name of an option")
            if names.count(name) > 1:
                raise yaml.YAMLError(f"the option {name!r} is there twice")
        return super().construct_mapping(node, deep)


def read_recipe_file(path: Path) -> dict[str, Any]:
    """Read the options that a recipe file gives.

    Raises
    ------
    InputError
        It cannot be read, is not YAML, or is no mapping of options.
    """
    try:
        text = read_small_text(path, RECIPE_BYTES)
        found = yaml.load(text, _Loader) or {}
    except FileNotFoundError:
        raise InputError(f"The recipe {path} does not exist. Pass an existing YAML file.") from None
    except ArtifactError as problem:
        raise InputError(f"The recipe cannot be read: {problem}") from None
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as problem:
        what = "it is nested too deep" if isinstance(problem, RecursionError) else " ".join(str(problem).split())
        raise InputError(f"The recipe {path} is not YAML that can be used: {what}") from None
    if not isinstance(found, dict):
        raise InputError(f"The recipe {path} holds a {type(found).__name__}; expected `option: value` lines.")
    return found
